"""Batches of segmentation and detection, each defined by its step."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from scale_smog import distributed
from scale_smog.data import EpochPlan
from scale_smog.data.loaders.torch import with_plain_errors
from scale_smog.data.workers import exit_with_parent, start_forkserver


class _StepBatches(Dataset):
    """Item `step` is this rank's batch of that step, each sample with a seed of its own."""

    def __init__(self, plan: EpochPlan, load: Callable[[int, int], Any]) -> None:
        self._plan, self._load = plan, load
        self._place = distributed.rank(), distributed.world_size()

    def __getitem__(self, step: int) -> list[Any]:
        ids = self._plan.ids(step, *self._place)
        epochs = self._plan.epochs(step, *self._place)
        seeds = [
            int(np.random.SeedSequence([self._plan.seed, i, e]).generate_state(1)[0])
            for i, e in zip(ids.tolist(), epochs.tolist(), strict=True)
        ]
        return [self._load(i, seed) for i, seed in zip(ids.tolist(), seeds, strict=True)]


def training_batches(
    plan: EpochPlan, load: Callable[[int, int], Any], workers: int
) -> Callable[[range], Iterable[list[Any]]]:
    """Batches of a range of steps, in worker processes.

    Args:
        plan: which samples.
        load: (sample id, seed) -> one training sample.
        workers: processes of this rank; 0: this one.

    Raises:
        UserError: while loading: what `load` raises, in one line from a worker too.
    """

    def batches(steps: range) -> Iterable[list[Any]]:
        if workers:
            start_forkserver(__name__, "torchvision")
        loader = DataLoader(
            _StepBatches(plan, load),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=exit_with_parent,
        )
        return with_plain_errors(iter(loader))

    return batches


def own_samples(num_samples: int) -> range:
    """The samples that this rank evaluates."""
    return range(distributed.rank(), num_samples, distributed.world_size())
