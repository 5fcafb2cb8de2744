"""Embeds the images of a dataset, all ranks sharing the work."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.image_folder import Images
from scale_smog.data.loaders.build import build_evaluation_loader


def embed_images(
    embed: Callable[[Tensor], Tensor],
    data: DataConfig,
    config: EvaluationConfig,
    dataset: Images,
    ids: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Features of centre crops; a collective.

    Args:
        embed: [B, 3, H, W] -> [B, F].
        data: who decodes.
        config: size of the crops and of a batch.
        dataset: where the images are.
        ids: which ones, [N] int64.
        device: of the crops.

    Returns:
        [N, F] float32 in the order of `ids`, on every rank.
    """
    batches = build_evaluation_loader(data, config, dataset, ids, device)
    features = torch.stack([embed(batch.large[0]).float() for batch in batches])  # [S, B, F]
    everyone = distributed.gather_columns(features)  # [S, W * B, F]
    return everyone.flatten(0, 1)[: len(ids)]  # the last step repeats images to fill itself


def each_once(
    data: DataConfig,
    config: EvaluationConfig,
    dataset: Images,
    ids: np.ndarray,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's centre crops [B, 3, H, W] and labels [B], no image twice; arguments as above.

    Every rank gets equally many batches; the last may be empty.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = build_evaluation_loader(data, config, dataset, ids, device)
    for step, batch in enumerate(batches):
        size = len(batch.label)
        num = min(max(len(ids) - (step * world_size + rank) * size, 0), size)
        yield batch.large[0][:num], batch.label[:num].to(device)
