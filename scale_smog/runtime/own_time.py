"""Time that a thread spends on its own work: not waiting for other ranks, nor for a free core."""

import sys
import threading
import time
import weakref
from pathlib import Path

SAMPLE_S, MAX_SAMPLE_S = 0.1, 1.0
# A thread that sleeps in one of these waits for other ranks.
COLLECTIVES = (
    "/torch/distributed/",
    "/torch/autograd/graph.py",  # the backward pass, in which DDP reduces gradients
    "/deepspeed/",
    "/scale_smog/distributed/",
    "/scale_smog/models/sync_batch_norm.py",
    "/scale_smog/runtime/preemption.py",
)


class OwnTime:
    """Own time of the thread that makes this, from the last `restart` on.

    Its processor time is exact. Whether it sleeps elsewhere, for data, a disk or a lock, is
    sampled; without Linux's /proc it is not known, and counts as none.

    Args:
        counts_cpu: whether processor time counts; a thread that waits for a GPU spins.
    """

    def __init__(self, counts_cpu: bool = True):
        self._clock = time.pthread_getcpuclockid(threading.get_ident()) if counts_cpu else None
        self._ident = threading.get_ident()
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self.restart()
        threading.Thread(target=_sample, args=(weakref.ref(self),), daemon=True).start()

    def restart(self) -> None:
        """Counts from zero."""
        self._asleep_s, self._cpu_start_s = 0.0, self._cpu_s()

    def seconds(self) -> float:
        """Processor time and sleep since the last restart."""
        return self._cpu_s() - self._cpu_start_s + self._asleep_s

    def _cpu_s(self) -> float:
        return time.clock_gettime(self._clock) if self._clock is not None else 0.0

    def sample(self, seconds: float) -> None:
        """Counts `seconds` if the thread sleeps, and not in a collective."""
        if self._is_asleep() and not self._is_in_collective():
            self._asleep_s += seconds

    def _is_asleep(self) -> bool:
        try:
            state = self._stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state in ("S", "D")  # R: it runs, or waits for a core

    def _is_in_collective(self) -> bool:
        frame = sys._current_frames().get(self._ident)
        name = frame.f_code.co_filename if frame else ""
        return any(part in name for part in COLLECTIVES)


def _sample(reference: "weakref.ref[OwnTime]") -> None:
    """Samples until nobody holds the object any more; a sample stands for the time since the last.

    On a loaded machine that is more than SAMPLE_S; of a very late one no more is known.
    """
    before = time.monotonic()
    while (own_time := reference()) is not None:
        now = time.monotonic()
        own_time.sample(min(now - before, MAX_SAMPLE_S))
        del own_time
        before = now
        time.sleep(SAMPLE_S)
