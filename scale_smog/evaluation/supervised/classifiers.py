"""What linear and semi-supervised evaluation share: random crops to train on, top-1 and top-5."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import AugmentConfig
from scale_smog.data.augment import RandomView
from scale_smog.data.batch import Batch
from scale_smog.data.image_folder import Images
from scale_smog.data.loaders.build import build_training_loader, exact_loader_settings
from scale_smog.errors import UserError
from scale_smog.evaluation.features import each_once
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.splits import SubsetPlan

RATE_BATCH = 256  # images that a learning rate is meant for


def crops(
    job: Job, dataset: Images, ids: np.ndarray, config: Any
) -> tuple[Callable[[range], Iterable[Batch]], int]:
    """Batches of random crops, mirrored or not, of some images, and the number of steps.

    Args:
        job: size of the crops, and who decodes.
        dataset: where the images are.
        ids: which ones [N].
        config: section with batch, epochs, scale and seed.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    if config.batch % distributed.world_size():
        raise UserError(f"{job.name}.batch={config.batch} does not split over the ranks")
    plan = SubsetPlan(ids, config.batch, config.seed)
    # The recipe's colours and blur are for pre-training; here crops and mirrors are all.
    plain = AugmentConfig(jitter=0.0, grey=0.0)
    view = RandomView(plain, 0, job.recipe.evaluation.image_px, config.scale, 0.0, 0.0)

    def batches(steps: range) -> Iterable[Batch]:
        data = exact_loader_settings(job.recipe.data)
        return build_training_loader(data, [view], dataset, plan, steps, job.device)

    return batches, max(1, math.ceil(config.epochs * len(ids) / config.batch))


@torch.no_grad()
def accuracies(
    job: Job, scores: Callable[[Tensor], Tensor], dataset: Images, ids: np.ndarray
) -> list[tuple[float, float]]:
    """Top-1 and top-5 accuracy, 0 to 1, of L classifiers on centre crops; a collective.

    Args:
        job: size of the crops, and who decodes.
        scores: images [B, 3, H, W] -> [B, L, C].
        dataset: labelled images.
        ids: which ones [N].
    """
    hits = torch.zeros(1, 2, dtype=torch.float64, device=job.device)
    recipe = job.recipe
    for images, labels in each_once(recipe.data, recipe.evaluation, dataset, ids, job.device):
        if len(labels):
            hits = hits + top_hits(scores(images), labels)  # [L, 2]
    # A rank whose every batch was empty has one row: it takes the shape of the others'.
    num = int(max_over_ranks(len(hits)))
    hits = distributed.all_reduce(hits.expand(num, 2).contiguous())
    return [(top1 / len(ids), top5 / len(ids)) for top1, top5 in hits.tolist()]


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of B images have their class first, and among the first five.

    Args:
        scores: [B, L, C].
        labels: [B] int64.

    Returns:
        [L, 2] float64.
    """
    best = scores.topk(min(5, scores.shape[2]), dim=2).indices  # [B, L, 5]
    hit = best == labels[:, None, None]
    return torch.stack([hit[..., 0].sum(0), hit.any(2).sum(0)], dim=1).double()


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' numbers."""
    values: list[int] = [value] * distributed.world_size()
    if distributed.world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return max(values)
