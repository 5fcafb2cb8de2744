"""Features of a dataset's images by a frozen net, all ranks sharing the work."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig, ModelConfig
from scale_smog.data.datasets import Images
from scale_smog.data.loaders.build import build_evaluation_loader
from scale_smog.models import build_backbone

Encoder = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> features [B, F]
TINY_PX = 32


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline without a net: pixels [B, 3 h w] of images [B, 3, H, W], h and w at most 32.

    Larger images are shrunk ("tiny images", Torralba et al., PAMI 2008): of 224 px the features
    would be fifty times as long.
    """
    height, width = images.shape[2:]
    tiny = F.adaptive_avg_pool2d(images, (min(height, TINY_PX), min(width, TINY_PX)))
    return tiny.flatten(1)


def random_backbone(model: ModelConfig, seed: int) -> nn.Module:
    """The baseline of a net that has learnt nothing."""
    torch.manual_seed(seed)
    return build_backbone(model.backbone, model.width, model.small_images, model.drop_path)


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
    features = _embed(encoder, data, config, dataset, ids, device)  # [S, B, F]
    gathered = distributed.gather_columns(features)  # [S, W * B, F]
    return gathered.flatten(0, 1)[: len(ids)]  # the last step repeats images to fill itself


def embed_share(
    encoder: Encoder,
    data: DataConfig,
    config: EvaluationConfig,
    dataset: Images,
    ids: np.ndarray,
    device: torch.device,
) -> tuple[Tensor, np.ndarray]:
    """Features of this rank's share of the images, which together are all; a collective.

    For features that are too many for one rank: ImageNet's of ResNet-50 x4 are 39 GiB. Arguments as
    of `embed_images`.

    Returns:
        [n, F] float32, and the images' places in `ids`, [n] int64.
    """
    features = _embed(encoder, data, config, dataset, ids, device)  # [S, B, F]
    num_steps, batch = features.shape[:2]
    first = distributed.rank() * batch
    row = distributed.world_size() * batch * np.arange(num_steps)[:, None]
    places = (row + first + np.arange(batch)).ravel()  # [S * B]
    num_own = int((places < len(ids)).sum())  # what fills the last step comes last
    return features.flatten(0, 1)[:num_own], places[:num_own]


def _embed(
    encoder: Encoder,
    data: DataConfig,
    config: EvaluationConfig,
    dataset: Images,
    ids: np.ndarray,
    device: torch.device,
) -> Tensor:
    """[S, B, F] of this rank's batches, which are never held twice."""
    features, step = torch.empty(0, device=device), -1
    for step, batch in enumerate(build_evaluation_loader(data, config, dataset, ids, device)):
        found = encoder(batch.large[0]).float()  # [B, F]
        if step == 0:
            num_steps = -(-len(ids) // (distributed.world_size() * len(found)))
            features = found.new_empty(num_steps, *found.shape)
        features[step] = found
    assert step + 1 == len(features)
    return features
