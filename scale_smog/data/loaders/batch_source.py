"""One rank's part of a plan: which samples, and how to augment them, step by step."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Protocol

import numpy as np

from scale_smog.data.augment import AugmentationParams, View
from scale_smog.data.datasets import Images

DRAWN_AT_ONCE = 1024  # images whose augmentation is drawn together
NUM_READERS = 16  # threads that help where reading is slow
SLOW_READ_S, PATIENCE = 2e-4, 8  # an image on average; images that may take longer at first


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_READERS, "reader")


class Plan(Protocol):
    """Sample ids and epochs as a function of the step."""

    def images_per_rank(self, world_size: int) -> int: ...

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray: ...

    def epochs(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray: ...

    def next_steps(self, step: int, ranks: range, world_size: int) -> np.ndarray: ...


@dataclass(frozen=True)
class BatchSource:
    """Everything a loader needs to know to make the batch of any step, before any pixel exists."""

    dataset: Images
    plan: Plan
    views: Sequence[View]
    seed: int
    rank: int
    world_size: int

    @property
    def batch_size(self) -> int:
        """B, this rank's images of a step.

        Raises:
            UserError: the ranks do not divide the batch.
        """
        return self.plan.images_per_rank(self.world_size)

    def ids(self, step: int) -> np.ndarray:
        """Sample ids [B] int64 of this rank."""
        return self.plan.ids(step, self.rank, self.world_size)

    def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        """The stored image files, each [bytes] uint8.

        While they come fast one thread reads them: each thread more takes the interpreter's lock
        from the one that launches a GPU's kernels (`benchmarks/launching.py`). A file system behind
        a network answers many requests as soon as one.
        """
        contents: dict[int, np.ndarray] = {}
        rows = iter(range(len(ids)))  # of all threads: each takes the next
        others: list[Future[None]] = []

        def read_rest() -> None:
            for row in rows:
                contents[row] = self._read(ids[row])

        begin = time.perf_counter()
        for row in rows:
            contents[row] = self._read(ids[row])
            if not others and time.perf_counter() - begin > SLOW_READ_S * (row + 1 + PATIENCE):
                others = [_readers().submit(read_rest) for _ in range(NUM_READERS)]
        for other in others:
            other.result()
        return [contents[row] for row in range(len(ids))]

    def _read(self, sample_id: np.int64) -> np.ndarray:
        return np.frombuffer(self.dataset.read(int(sample_id)), dtype=np.uint8)

    def augmentation_params(self, step: int) -> list[AugmentationParams]:
        """One entry a view, each for this rank's B samples."""
        return self._draw(range(step, step + 1))[0]

    def params_from(self, step: int) -> Iterator[list[AugmentationParams]]:
        """`augmentation_params` of this step and all that follow, drawn for some of them at once.

        NumPy draws for 1,024 images in hardly more time than for 64, and while it does, the thread
        that launches the GPU's kernels waits for the interpreter.
        """
        num_together = max(1, DRAWN_AT_ONCE // self.batch_size)
        for begin in count(step, num_together):
            yield from self._draw(range(begin, begin + num_together))

    def _draw(self, steps: range) -> list[list[AugmentationParams]]:
        """One entry a step, of one entry a view."""
        ids = np.concatenate([self.ids(step) for step in steps])
        epochs = np.concatenate(
            [self.plan.epochs(step, self.rank, self.world_size) for step in steps]
        )
        widths, heights = self.dataset.widths[ids], self.dataset.heights[ids]
        views = [view.sample(self.seed, ids, epochs, widths, heights) for view in self.views]
        rows = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(len(steps))]
        return [[params.rows(of_step) for params in views] for of_step in rows]
