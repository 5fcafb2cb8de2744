"""What is wrong with the groups or a step: collapse, and steps that are not finite."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import Figure, RunConfig
from scale_smog.data.batch import Batch
from scale_smog.errors import RunEnded, first_few
from scale_smog.grouping import perplexity

COLLAPSED_SHARE = 0.1  # of the groups
# A group, on average, before a warning: even use of half as many features as groups has four times
# the perplexity that is warned of, and 40 steps of a small batch have no more.
ENOUGH_FEATURES = 0.5


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


class StopBelow:
    """Notes figures that stay too low, to end a run that is not worth its time.

    Args:
        stop_below: figure -> least value (`run.stop_below`).
        patience: values in a row below it (`run.stop_patience`).
    """

    def __init__(self, stop_below: Mapping[Figure, float], patience: int):
        self._least, self._patience = stop_below, patience
        self._num_below = dict.fromkeys(stop_below, 0)
        self.problem = ""  # what is to be said at the end of the run, if it should end

    def note(self, figures: Mapping[str, float]) -> None:
        """Takes note of newly logged figures; `step` is among them."""
        for name, least in self._least.items():
            if name in figures:
                is_below = not figures[name] >= least  # nor is a figure that is not a number
                self._num_below[name] = self._num_below[name] + 1 if is_below else 0
                if self._num_below[name] == self._patience:
                    self.problem = (
                        f"run.stop_below: {name} has been below {least:g} for {self._patience} "
                        f"values in a row, {figures[name]:.4g} at step {figures['step']}; the "
                        "newest checkpoint stands, and run.start_from begins another run with it"
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
            RunEnded: on all ranks, after `run.max_skipped` in a row; their last batch is dumped.
        """
        if is_applied:
            self._num_in_a_row = 0
            return
        self._num_in_a_row += 1
        causes = distributed.gather_objects(_what_is_not_finite(loss, batch))
        named = [f"rank {r}: {cause}" for r, cause in enumerate(causes) if cause]
        cause = first_few(named, "; ") or "gradients, with finite losses"
        say(f"warning: step {step} left out, not finite ({cause})")
        if self._num_in_a_row >= self._run.max_skipped:
            folder = Path(self._run.dir) / "not_finite" / f"step-{step:08d}"
            where = _dump(folder, step, causes[distributed.rank()], batch)
            raise RunEnded(
                f"{self._num_in_a_row} steps in a row were not finite, the last one {step} "
                f"({cause}){where}; begin another run from the newest "
                f"checkpoint, with run.start_from={self._run.dir}, another run.dir and a lower "
                "optimizer.base_lr or optimizer.clip_norm"
            )


def _what_is_not_finite(loss: Tensor, batch: Batch) -> str:
    views = [*batch.large, *batch.small]
    bad = torch.stack([~view.flatten(1).sum(dim=1).isfinite() for view in views]).any(dim=0)  # [B]
    if bad.any():
        ids = batch.sample_id[bad.to(batch.sample_id.device)].tolist()
        return f"images of samples {', '.join(map(str, ids[:8]))} on {socket.gethostname()}"
    return "" if loss.isfinite() else f"loss {loss.item()} on {socket.gethostname()}"


def _dump(folder: Path, step: int, cause: str, batch: Batch) -> str:
    """Writes this rank's batch; returns where it is, for a message on what it ends with."""
    tensors = {f"large_{i}": view for i, view in enumerate(batch.large)}
    tensors |= {f"small_{i}": view for i, view in enumerate(batch.small)}
    tensors = {key: x.cpu().contiguous() for key, x in tensors.items()}
    tensors["sample_id"] = batch.sample_id.cpu()
    name = f"rank-{distributed.rank()}"
    facts = {"step": step, "cause": cause, "host": socket.gethostname(), "pid": os.getpid()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    except (OSError, SafetensorError) as error:  # such as a full disk
        return f"; the batches cannot be written: {error}"
    return f": the batches are in {folder}"
