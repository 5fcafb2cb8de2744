"""Features of a dataset's images by a frozen net, all ranks sharing the work."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.datasets import Images
from scale_smog.data.loaders.build import build_evaluation_loader

Encoder = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> features [B, F]


def embed_images(
    encoder: Encoder,
    data: DataConfig,
    config: EvaluationConfig,
    dataset: Images,
    ids: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Features of centre crops; a collective.

    Args:
        encoder: [B, 3, H, W] -> [B, F].
        data: who decodes.
        config: size of the crops and of a batch.
        dataset: where the images are.
        ids: which ones, [N] int64.
        device: of the crops.

    Returns:
        [N, F] float32 in the order of `ids`, on every rank.
    """
    batches = build_evaluation_loader(data, config, dataset, ids, device)
    features = torch.stack([encoder(batch.large[0]).float() for batch in batches])  # [S, B, F]
    gathered = distributed.gather_columns(features)  # [S, W * B, F]
    return gathered.flatten(0, 1)[: len(ids)]  # the last step repeats images to fill itself
