"""Which sample is seen when: a pure function of (seed, step), the same at every world size."""

from functools import lru_cache

import numpy as np

from scale_smog.counter_rng import random_words
from scale_smog.errors import UserError


class EpochPlan:
    """Sample order of a run.

    The samples form one endless stream, epoch after epoch, each epoch a new permutation of all
    samples; step `s` takes the next `global_batch` of it. So every sample is seen exactly once an
    epoch at any world size, and what does not fill the last batch of an epoch opens the next one.
    The only state is the step.

    Args:
        num_samples: samples of the dataset.
        global_batch: samples of one step over all ranks.
        seed: of the order.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int = 0):
        if num_samples < 1 or global_batch < 1:
            raise UserError(f"a plan needs samples and a batch: {num_samples}, {global_batch}")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64 of one rank at one step: its contiguous slice of the global batch.

        Raises:
            UserError: the ranks do not divide the global batch.
        """
        position = self._positions(step, rank, world_size)
        ids = np.empty(len(position), dtype=np.int64)
        for epoch in np.unique(position // self.num_samples):
            here = position // self.num_samples == epoch
            order = _permutation(self.num_samples, self.seed, int(epoch))
            ids[here] = order[position[here] % self.num_samples]
        return ids

    def epochs(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The epoch [B] int64 that each of `ids` belongs to; a batch may straddle two."""
        return self._positions(step, rank, world_size) // self.num_samples

    def steps(self, epochs: float) -> int:
        """Whole steps in a number of epochs, at least 1."""
        return max(1, int(epochs * self.num_samples / self.global_batch + 1e-9))

    def _positions(self, step: int, rank: int, world_size: int) -> np.ndarray:
        if self.global_batch % world_size:
            raise UserError(
                f"data.global_batch={self.global_batch} is not a multiple of {world_size} ranks: "
                f"take {-(-self.global_batch // world_size) * world_size}"
            )
        size = self.global_batch // world_size
        start = step * self.global_batch + rank * size
        return np.arange(start, start + size, dtype=np.int64)


class SequentialPlan:
    """Every sample once, in order, for evaluation.

    Steps are equal on all ranks: where the samples do not fill them, the last sample is repeated,
    and `keep` says which rows count.

    Args:
        sample_ids: [N] int64, the samples to visit.
        batch: samples of one step of one rank.
    """

    def __init__(self, sample_ids: np.ndarray, batch: int):
        self.sample_ids = sample_ids
        self.batch = batch

    def num_steps(self, world_size: int = 1) -> int:
        """Steps until every sample is visited."""
        return -(-len(self.sample_ids) // (self.batch * world_size))

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64; past the end the last one again."""
        start = (step * world_size + rank) * self.batch
        rows = np.arange(start, start + self.batch)
        return self.sample_ids[np.minimum(rows, len(self.sample_ids) - 1)]

    def epochs(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Zeros [B]: evaluation has one epoch."""
        return np.zeros(self.batch, dtype=np.int64)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Random order [num_samples] int64: the ranks of one random number a sample."""
    # Sorting raw draws instead of Generator.permutation, whose algorithm NumPy may change.
    draws = random_words(seed, np.arange(num_samples), epoch, stream=-1, num_words=2)
    return np.argsort((draws[:, 0] << np.uint64(32)) | draws[:, 1], kind="stable")
