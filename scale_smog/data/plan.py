"""Which sample is seen when: a pure function of (seed, step), the same at every world size."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from scale_smog.counter_rng import ORDERS, random_words
from scale_smog.errors import UserError

NEVER = np.iinfo(np.int64).max


def images_per_rank(global_batch: int, world_size: int, key: str = "data.global_batch") -> int:
    """B, a rank's part of a batch.

    Args:
        global_batch: images of a step over all ranks.
        world_size: number of ranks.
        key: setting that names the batch.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    if global_batch % world_size:
        raise UserError(
            f"{key}={global_batch} is not a multiple of {world_size} ranks: "
            f"take {-(-global_batch // world_size) * world_size}"
        )
    return global_batch // world_size


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
        shard_sizes: samples of each shard. If given, an epoch goes through the shards in random
            order, `block_shards` at a time, whose samples it mixes: fewer files are read at
            once, which network filesystems and page caches like. Default: all samples are mixed.
        block_shards: shards of one block.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        seed: int = 0,
        shard_sizes: Sequence[int] | None = None,
        block_shards: int = 16,
    ):
        if num_samples < 1 or global_batch < 1:
            raise UserError(f"a plan needs samples and a batch: {num_samples}, {global_batch}")
        if shard_sizes is not None and sum(shard_sizes) != num_samples:
            raise UserError(f"{num_samples} samples, but the shards have {sum(shard_sizes)}")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self._shard_sizes = None if shard_sizes is None else tuple(shard_sizes)
        self._block_shards = block_shards

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64 of one rank at one step: its contiguous slice of the global batch.

        Raises:
            UserError: the ranks do not divide the global batch.
        """
        position = self._positions(step, rank, world_size)
        ids = np.empty(len(position), dtype=np.int64)
        for epoch in np.unique(position // self.num_samples):
            here = position // self.num_samples == epoch
            order = self._order(int(epoch))
            ids[here] = order[position[here] % self.num_samples]
        return ids

    def images_per_rank(self, world_size: int) -> int:
        """B.

        Raises:
            UserError: the ranks do not divide the global batch.
        """
        return images_per_rank(self.global_batch, world_size)

    def epochs(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The epoch [B] int64 that each of `ids` belongs to; a batch may straddle two."""
        return self._positions(step, rank, world_size) // self.num_samples

    def steps(self, epochs: float) -> int:
        """Whole steps in a number of epochs, at least 1."""
        return max(1, int(epochs * self.num_samples / self.global_batch + 1e-9))

    def next_steps(self, step: int, ranks: range, world_size: int) -> np.ndarray:
        """When some ranks read each sample next, from `step` to the end of the epoch after its own.

        Returns:
            Steps [N] int64; NEVER for what they do not read until then.
        """
        first, size = step * self.global_batch, self.images_per_rank(world_size)
        steps = np.full(self.num_samples, NEVER)
        for epoch in (first // self.num_samples + 1, first // self.num_samples):  # the nearer last
            order = self._order(epoch)
            position = epoch * self.num_samples + np.arange(self.num_samples)
            rank = position % self.global_batch // size
            ours = (position >= first) & (rank >= ranks.start) & (rank < ranks.stop)
            steps[order[ours]] = position[ours] // self.global_batch
        return steps

    def _order(self, epoch: int) -> np.ndarray:
        if self._shard_sizes is None:
            return _permutation(self.num_samples, self.seed, epoch)
        return _block_order(self._shard_sizes, self._block_shards, self.seed, epoch)

    def _positions(self, step: int, rank: int, world_size: int) -> np.ndarray:
        size = self.images_per_rank(world_size)
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

    def images_per_rank(self, world_size: int) -> int:
        """B, at any number of ranks."""
        return self.batch

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64; past the end the last one again."""
        start = (step * world_size + rank) * self.batch
        rows = np.arange(start, start + self.batch)
        return self.sample_ids[np.minimum(rows, len(self.sample_ids) - 1)]

    def next_steps(self, step: int, ranks: range, world_size: int) -> np.ndarray:
        """As of `EpochPlan`, from `step` to the end; of the samples up to the largest id."""
        position = np.arange(len(self.sample_ids))
        at, rank = position // (self.batch * world_size), position // self.batch % world_size
        ours = (at >= step) & (rank >= ranks.start) & (rank < ranks.stop)
        steps = np.full(int(self.sample_ids.max(initial=-1)) + 1, NEVER)
        steps[self.sample_ids[ours]] = at[ours]
        return steps

    def epochs(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Zeros [B]: evaluation has one epoch."""
        return np.zeros(self.batch, dtype=np.int64)


@lru_cache(maxsize=3)
def _block_order(sizes: tuple[int, ...], block_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Random order [sum(sizes)] int64 that mixes the samples of `block_shards` shards at a time."""
    num_shards, ends = len(sizes), np.cumsum(sizes)
    # The draws behind the samples' are the shards', so that the two orders share no numbers.
    drawn = _random_words64(int(ends[-1]) + num_shards, seed, epoch)
    shards = np.argsort(drawn[-num_shards:], kind="stable")
    turn = np.empty(num_shards, dtype=np.int64)  # of each shard: the block it comes in
    turn[shards] = np.arange(num_shards) // block_shards
    return np.lexsort((drawn[:-num_shards], np.repeat(turn, sizes)))


@lru_cache(maxsize=3)  # a batch may straddle two epochs, and a store is read ahead of it
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Random order [num_samples] int64: samples sorted by one random number each."""
    keys = _random_words64(num_samples, seed, epoch)
    # The low bits hold the sample: no two keys are equal, and sorted keys are the order itself.
    low = np.uint64((1 << (num_samples - 1).bit_length()) - 1)
    keys = (keys & ~low) | np.arange(num_samples, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def _random_words64(num: int, seed: int, epoch: int) -> np.ndarray:
    """Raw draws [num] uint64, to sort by: NumPy may change what `permutation` returns."""
    words = random_words(seed, np.arange(-(-num // 2)), epoch, ORDERS, num_words=4)
    return ((words[:, ::2] << np.uint64(32)) | words[:, 1::2]).reshape(-1)[:num]
