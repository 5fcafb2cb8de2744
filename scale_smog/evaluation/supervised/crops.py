"""What classifiers see: random crops to train on, centre crops to be measured on."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import AugmentConfig
from scale_smog.data import EpochPlan
from scale_smog.data.augment import RandomView
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images
from scale_smog.data.loaders.build import (
    build_evaluation_loader,
    build_training_loader,
    with_random_access,
)
from scale_smog.data.plan import NEVER, images_per_rank
from scale_smog.evaluation.protocols import FinetuneConfig, LinearConfig
from scale_smog.evaluation.task import EvaluationTask

CROP_SCALE = (0.08, 1.0)  # area of the random crops, in every protocol


class SubsetPlan(EpochPlan):
    """The order of a training on some samples of a dataset.

    Args:
        sample_ids: [N] int64, the samples to train on.
        batch: samples of one step over all ranks.
        seed: of the order.
    """

    def __init__(self, sample_ids: np.ndarray, batch: int, seed: int):
        super().__init__(len(sample_ids), batch, seed)
        self._sample_ids = sample_ids

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64 of one rank at one step."""
        return self._sample_ids[super().ids(step, rank, world_size)]

    def next_steps(self, step: int, ranks: range, world_size: int) -> np.ndarray:
        """As of `EpochPlan`; of the dataset's samples up to the largest id."""
        steps = np.full(int(self._sample_ids.max()) + 1, NEVER)
        steps[self._sample_ids] = super().next_steps(step, ranks, world_size)
        return steps


def random_crops(
    task: EvaluationTask, dataset: Images, ids: np.ndarray, config: LinearConfig | FinetuneConfig
) -> tuple[Callable[[range], Iterable[Batch]], int]:
    """Batches of random crops, mirrored or not, of some images, and the number of steps.

    Args:
        task: size of the crops, and who decodes.
        dataset: where the images are.
        ids: which ones [N].
        config: batch, epochs and seed.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    images_per_rank(config.batch, distributed.world_size(), f"{task.name}.batch")
    plan = SubsetPlan(ids, config.batch, config.seed)
    # The recipe's colours and blur are for pre-training; here crops and mirrors are all.
    plain = AugmentConfig(jitter=0.0, grey=0.0)
    view = RandomView(plain, 0, task.recipe.evaluation.image_px, CROP_SCALE, 0.0, 0.0)

    def batches(steps: range) -> Iterable[Batch]:
        data = with_random_access(task.recipe.data)
        return build_training_loader(data, [view], dataset, plan, steps, task.device)

    return batches, max(1, math.ceil(config.epochs * len(ids) / config.batch))


def center_crops(
    task: EvaluationTask, dataset: Images, ids: np.ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's centre crops [B, 3, H, W] and labels [B] int64, no image twice.

    Every rank gets equally many batches; the last may be empty.

    Args:
        task: size of the crops and of a batch, and who decodes.
        dataset: where the images are.
        ids: which ones [N].
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    data, evaluation = task.recipe.data, task.recipe.evaluation
    batches = build_evaluation_loader(data, evaluation, dataset, ids, task.device)
    for step, batch in enumerate(batches):
        size = len(batch.label)
        num = min(max(len(ids) - (step * world_size + rank) * size, 0), size)
        yield batch.large[0][:num], batch.label[:num].to(task.device)
