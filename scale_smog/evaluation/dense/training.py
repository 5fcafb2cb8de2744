"""What segmentation and detection share: ResNets as feature maps, batches that a step defines."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from scale_smog import distributed
from scale_smog.data import EpochPlan
from scale_smog.errors import UserError
from scale_smog.evaluation.job import Job
from scale_smog.models.resnet import ResNet

INSTALL = "pip install -e '.[dense]'"


def feature_net(job: Job) -> ResNet:
    """The checkpoint's backbone, which has to be a ResNet.

    Raises:
        UserError: it is not.
    """
    net = job.backbone()
    if not isinstance(net, ResNet):
        raise UserError(
            f"{job.name} needs a ResNet's feature maps, and the checkpoint holds a "
            f"{job.recipe.model.backbone}"
        )
    return net


def stage_names(net: ResNet) -> list[str]:
    """Its stages, from the largest map to the smallest."""
    return [f"layer{index + 1}" for index in range(net.num_stages)]


def stage_channels(net: ResNet) -> list[int]:
    """Channels of each stage's map: they double from one to the next."""
    return [net.num_features // 2 ** (net.num_stages - 1 - i) for i in range(net.num_stages)]


def dilate(net: ResNet, num_stages: int = 2) -> None:
    """Makes the last stages dilate instead of stride, in place; the weights stay as they are.

    As torchvision's `replace_stride_with_dilation`: maps of 1/8 of the image instead of 1/32, the
    first block of a stage with the dilation of the stage before.
    """
    dilation = 1
    for name in stage_names(net)[-num_stages:]:
        for number, block in enumerate(getattr(net, name)):
            own = dilation if number == 0 else 2 * dilation
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (own, own)
        dilation *= 2


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
    """

    def batches(steps: range) -> Iterable[list[Any]]:
        return DataLoader(
            _StepBatches(plan, load),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
        )

    return batches


def own_samples(num_samples: int) -> range:
    """The samples that this rank judges."""
    return range(distributed.rank(), num_samples, distributed.world_size())


def autocast(job: Job) -> torch.autocast:
    """bf16 where the recipe has it."""
    is_bf16 = job.recipe.engine.precision == "bf16"
    return torch.autocast(job.device.type, torch.bfloat16, enabled=is_bf16)


def require_file(path: Path, purpose: str) -> Path:
    """Raises a UserError unless there is such a file."""
    if not path.is_file():
        raise UserError(f"{purpose} is missing: no file {path}")
    return path
