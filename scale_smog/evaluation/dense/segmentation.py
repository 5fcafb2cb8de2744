"""FCN on the checkpoint's ResNet: VOC 2012 and Cityscapes (SMoG Table 5)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead

from scale_smog import distributed
from scale_smog.data import EpochPlan
from scale_smog.data.plan import images_per_rank
from scale_smog.evaluation.dense.batches import own_samples, training_batches
from scale_smog.evaluation.dense.feature_maps import dilate, require_resnet, stage_names
from scale_smog.evaluation.dense.requirements import import_torchmetrics
from scale_smog.evaluation.dense.segmentation_data import (
    IGNORED,
    SegmentationImages,
    TrainingSamples,
    normalised,
)
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.evaluation.training import MOMENTUM, Training, train
from scale_smog.models import process_group_for, synchronise_batch_norm
from scale_smog.models.resnet import ResNet

WEIGHT_DECAY = 5e-4
POLY_POWER = 0.9  # of the polynomial decay of the learning rate


def build_fcn(net: ResNet, num_classes: int) -> FCN:
    """torchvision's FCN on a ResNet, whose last two stages dilate instead of striding."""
    dilate(net)
    backbone = IntermediateLayerGetter(net, {stage_names(net)[-1]: "out"})
    return FCN(backbone, FCNHead(net.num_features, num_classes))


def polynomial(step: int, num_steps: int) -> float:
    """Falls from 1 to 0 a little slower than a line."""
    return (1 - step / num_steps) ** POLY_POWER


def evaluate_segmentation(
    task: EvaluationTask, train_set: SegmentationImages, val_set: SegmentationImages
) -> Results:
    """Trains on the first images; mIoU and mAcc on the others, single scale; a collective.

    Raises:
        UserError: the ranks do not divide the batch, torchmetrics is missing, or the net is no
            ResNet.
    """
    config = task.protocols.segmentation
    images_per_rank(config.batch, distributed.world_size(), "segmentation.batch")
    metrics = import_torchmetrics()
    torch.manual_seed(config.seed)  # of the head
    net = (
        build_fcn(require_resnet(task.backbone(), task.name), train_set.num_classes)
        .to(task.device)
        .train()
    )
    synchronise_batch_norm(net, process_group_for("global"))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def loss(wrapped: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        images = torch.stack([image for image, _ in batch]).to(task.device)  # [B, 3, H, W]
        classes = torch.stack([classes for _, classes in batch]).to(task.device)  # [B, H, W]
        with task.autocast():
            scores = wrapped(images)["out"]  # [B, C, H, W]
        counted = (classes != IGNORED).sum().clamp(min=1)
        summed = F.cross_entropy(scores.float(), classes, ignore_index=IGNORED, reduction="sum")
        return summed / counted  # zero, not nan, for a batch of ignored pixels

    samples = TrainingSamples(train_set, config.crop_px)
    plan = EpochPlan(len(train_set.pairs), config.batch, config.seed)
    schedule = partial(polynomial, num_steps=config.steps)
    training = Training(net, optimizer, schedule, loss, config.steps, config.checkpoint_every)
    train(task, "fcn", training, training_batches(plan, samples, config.workers))
    return _measure(task, net.eval(), val_set, metrics)


@torch.no_grad()
def _measure(
    task: EvaluationTask, net: nn.Module, images: SegmentationImages, metrics: Any
) -> dict[str, float]:
    """Whole images, one at a time; every rank its part."""
    settings = {"num_classes": images.num_classes, "ignore_index": IGNORED, "average": "macro"}
    miou = metrics.MulticlassJaccardIndex(**settings).to(task.device)
    macc = metrics.MulticlassAccuracy(**settings).to(task.device)
    for index in own_samples(len(images.pairs)):
        image, classes = images.load(index)
        with task.autocast():
            scores = net(normalised(image)[None].to(task.device))["out"].float()  # [1, C, H, W]
        predicted, wanted = scores.argmax(dim=1), classes[None].long().to(task.device)
        miou.update(predicted, wanted)
        macc.update(predicted, wanted)
    distributed.barrier()
    return {"miou": miou.compute().item(), "macc": macc.compute().item()}  # over all ranks
