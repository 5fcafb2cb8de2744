"""What is wrong with the groups, a step or a rank: collapse, non-finite steps, stragglers."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import RunConfig
from scale_smog.data.batch import Batch
from scale_smog.errors import UserError
from scale_smog.grouping import perplexity

COLLAPSED_SHARE = 0.1  # of the groups
ENOUGH_FEATURES = 10  # a group, on average, before a warning
SLOW_PROBE = 1.0 / 0.7  # times the median of the ranks
LONG_WAIT = 0.2  # of a step, beyond the median of the ranks
TIMES_IN_A_ROW = 2  # before a rank is named: one slow moment is nobody's fault
PROBE_SIZE = {"cpu": 256, "cuda": 4096}


def collapse_warning(counts: Tensor) -> str | None:
    """One line with the remedy when the usage [K] has collapsed, else None."""
    num_groups = len(counts)
    now = perplexity(counts)
    is_early = counts.sum() < ENOUGH_FEATURES * num_groups
    if is_early or now >= max(2.0, COLLAPSED_SHARE * num_groups):
        return None
    return (
        f"groups are collapsing: perplexity {now:.1f} of {num_groups} groups; keep grouping.kmeans "
        "and grouping.reset_momentum on, reset more often (grouping.reset_every), or lower the "
        "learning rate"
    )


class SkippedSteps:
    """Counts steps that were left out because they were not finite, and gives up after a while.

    Args:
        run: the recipe's section.
    """

    def __init__(self, run: RunConfig):
        self._run = run
        self._num_in_a_row = 0

    def note(
        self,
        step: int,
        is_applied: bool,
        loss: Tensor,
        batch: Batch,
        say: Callable[[str], None],
    ) -> None:
        """Takes note of a finished step; a collective if it was left out.

        Raises:
            UserError: on all ranks, after `run.max_skipped` in a row; their last batch is dumped.
        """
        if is_applied:
            self._num_in_a_row = 0
            return
        self._num_in_a_row += 1
        causes = distributed.gather_objects(_what_is_not_finite(loss, batch))
        named = [f"rank {r}: {cause}" for r, cause in enumerate(causes) if cause][:8]
        cause = "; ".join(named) or "gradients, with finite losses"
        say(f"warning: step {step} left out, not finite ({cause})")
        if self._num_in_a_row >= self._run.max_skipped:
            folder = Path(self._run.dir) / "not_finite" / f"step-{step:08d}"
            _dump(folder, step, causes[distributed.rank()], batch)
            raise UserError(
                f"{self._num_in_a_row} steps in a row were not finite, the last one {step} "
                f"({cause}): the batches are in {folder}; lower optimizer.base_lr, or set "
                "optimizer.clip_norm; the same command goes on from the newest checkpoint"
            )


def _what_is_not_finite(loss: Tensor, batch: Batch) -> str:
    views = [*batch.large, *batch.small]
    bad = torch.stack([~view.flatten(1).sum(dim=1).isfinite() for view in views]).any(dim=0)  # [B]
    if bad.any():
        ids = batch.sample_id[bad.to(batch.sample_id.device)].tolist()
        return f"images of samples {', '.join(map(str, ids[:8]))} on {socket.gethostname()}"
    return "" if loss.isfinite() else f"loss {loss.item()} on {socket.gethostname()}"


def _dump(folder: Path, step: int, cause: str, batch: Batch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"large_{i}": view for i, view in enumerate(batch.large)}
    tensors |= {f"small_{i}": view for i, view in enumerate(batch.small)}
    tensors["sample_id"] = batch.sample_id
    name = f"rank-{distributed.rank()}"
    save_file(
        {key: x.cpu().contiguous() for key, x in tensors.items()}, folder / f"{name}.safetensors"
    )
    facts = {"step": step, "cause": cause, "host": socket.gethostname(), "pid": os.getpid()}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


class Stragglers:
    """Names a rank that is slower than the others, by its own work and not by waiting for them.

    Args:
        device: on which a small matrix product is timed.
    """

    def __init__(self, device: torch.device):
        self._hosts = distributed.gather_objects(socket.gethostname())
        size = PROBE_SIZE[device.type]
        self._matrix = torch.ones(size, size, device=device)
        self._suspects: dict[int, int] = {}

    def found(self, data_wait: float) -> str | None:
        """One line on the slow ranks, on every rank; a collective.

        Args:
            data_wait: share of this rank's last steps that it waited for its own data.
        """
        if distributed.world_size() == 1:
            return None
        mine = torch.tensor([data_wait, self._probe_s()])
        all_ranks = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(all_ranks, mine)
        waits, probes = (list(x) for x in zip(*(x.tolist() for x in all_ranks), strict=True))
        verdicts = {}
        for rank, host in enumerate(self._hosts):
            if waits[rank] - median(waits) > LONG_WAIT:
                verdicts[rank] = f"rank {rank} on {host} waits {waits[rank]:.0%} for its data"
            elif probes[rank] > SLOW_PROBE * median(probes):
                times = probes[rank] / median(probes)
                verdicts[rank] = f"rank {rank} on {host} computes {times:.1f} times as long"
        self._suspects = {rank: self._suspects.get(rank, 0) + 1 for rank in verdicts}
        named = [text for rank, text in verdicts.items() if self._suspects[rank] >= TIMES_IN_A_ROW]
        return f"slower than the other ranks: {'; '.join(named)}" if named else None

    def _probe_s(self) -> float:
        """Best of three: the first one finds a cold cache."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (self._matrix @ self._matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        return min(times)
