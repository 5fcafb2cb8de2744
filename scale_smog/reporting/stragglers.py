"""Names ranks that are slower than the others, by their own work."""

import socket
import time
from statistics import median

import torch
import torch.distributed as dist

from scale_smog import distributed
from scale_smog.errors import first_few
from scale_smog.runtime.own_time import OwnTime

WINDOW_S = 5.0  # at least, so that what is sampled means something
NUM_WINDOWS = 2  # in a row before a rank is named: one slow moment is nobody's fault
# By how much a rank's own work may exceed the median of the ranks.
MAX_EXCESS_S, MAX_EXCESS, MAX_RATIO = 0.5, 0.02, 2.0  # of a window: seconds, share of it, times
MAX_DATA_WAIT = 0.2  # of the time, beyond the median
MAX_GPU_RATIO = 1.0 / 0.7  # of a GPU's time for the same product to the median of the GPUs
SILENCE_S = 60.0  # after a line


class Stragglers:
    """Compares the ranks' own work, window by window.

    A false alarm is worse than none: neither waiting for other ranks counts, nor waiting for a core
    of a machine that others use too.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device):
        self._hosts = distributed.gather_objects(socket.gethostname())
        self._own_time = OwnTime(counts_cpu=device.type == "cpu")
        self._probe = GpuProbe(device) if device.type == "cuda" else None
        self._num_windows: dict[int, int] = {}  # in a row, of ranks that are slow
        self._named: set[int] = set()
        self._silent_until = 0.0
        self.restart()

    def restart(self) -> None:
        """Begins a window; to be called after what is not a step."""
        self._start = time.perf_counter()
        self._own_time.restart()

    def found(self, data_wait: float) -> str | None:
        """One line on ranks that have become slow; a collective.

        Args:
            data_wait: share of this rank's last steps that it waited for its own data.
        """
        if distributed.world_size() == 1:
            return None
        elapsed_s = time.perf_counter() - self._start
        probe_s = self._probe.seconds() if self._probe else 0.0
        mine = torch.tensor([elapsed_s, self._own_time.seconds(), data_wait, probe_s])
        ranks = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(ranks, mine)
        if ranks[0][0] < WINDOW_S:  # the same on all ranks
            return None
        self.restart()
        slow = self._compare(torch.stack(ranks).tolist())
        self._num_windows = {rank: self._num_windows.get(rank, 0) + 1 for rank in slow}
        return self._line({r: text for r, text in slow.items() if self._is_due(r)})

    def _compare(self, ranks: list[list[float]]) -> dict[int, str]:
        """What each slow rank does."""
        elapsed_s = ranks[0][0]
        _, own, waits, probes = (list(column) for column in zip(*ranks, strict=True))
        usual, slow = median(own), {}
        most = max(usual + max(MAX_EXCESS_S, MAX_EXCESS * elapsed_s), MAX_RATIO * usual)
        for rank, host in enumerate(self._hosts):
            name = f"rank {rank} on {host}"
            if own[rank] > most:
                slow[rank] = f"{name} is busy {min(1.0, own[rank] / elapsed_s):.0%} of the time"
                if waits[rank] - median(waits) > MAX_DATA_WAIT:
                    slow[rank] = f"{name} waits {waits[rank]:.0%} of the time for its data"
            elif probes[rank] > MAX_GPU_RATIO * median(probes):
                times = probes[rank] / median(probes)
                slow[rank] = f"the GPU of {name} computes {times:.1f} times as long"
        return slow

    def _is_due(self, rank: int) -> bool:
        return self._num_windows[rank] >= NUM_WINDOWS

    def _line(self, due: dict[int, str]) -> str | None:
        """Of ranks that have not been named since they were last as fast as the others."""
        self._named &= due.keys()
        news = [rank for rank in due if rank not in self._named]
        if not news or time.monotonic() < self._silent_until:
            return None
        self._silent_until = time.monotonic() + SILENCE_S
        self._named |= set(news)
        return f"slower than the other ranks: {first_few([due[rank] for rank in news], '; ')}"


class GpuProbe:
    """Times a small product on a GPU, by its own clock and without waiting for it.

    Args:
        device: the GPU.
    """

    SIZE, REPEATS = 2048, 3  # [2048, 2048] in bf16: 0.03 ms on an H100

    def __init__(self, device: torch.device):
        self._matrix = torch.ones(self.SIZE, self.SIZE, device=device, dtype=torch.bfloat16)
        self._events: list[torch.cuda.Event] = []

    def seconds(self) -> float:
        """Best time of the products that the last call queued, 0 at the first; queues new ones."""
        pairs = zip(self._events, self._events[1:], strict=False)
        times = [start.elapsed_time(end) for start, end in pairs if end.query()]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(self.REPEATS + 1)]
        for event in self._events:
            event.record()
            if event is not self._events[-1]:
                torch.mm(self._matrix, self._matrix)
        return min(times, default=0.0) / 1e3
