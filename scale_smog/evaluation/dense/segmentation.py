"""FCN on the checkpoint's ResNet: VOC 2012 and Cityscapes (SMoG Table 5)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead

from scale_smog import distributed
from scale_smog.data import EpochPlan
from scale_smog.errors import UserError
from scale_smog.evaluation.dense.segmentation_data import (
    IGNORED,
    SegmentationImages,
    TrainingSamples,
    normalised,
    open_segmentation,
)
from scale_smog.evaluation.dense.training import (
    INSTALL,
    autocast,
    dilate,
    feature_net,
    own_samples,
    stage_names,
    training_batches,
)
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.supervised.training import Training, train
from scale_smog.models import process_group_for, synchronise_batch_norm
from scale_smog.models.resnet import ResNet


def build_fcn(net: ResNet, num_classes: int) -> FCN:
    """torchvision's FCN on a ResNet, whose last two stages dilate instead of striding."""
    dilate(net)
    backbone = IntermediateLayerGetter(net, {stage_names(net)[-1]: "out"})
    return FCN(backbone, FCNHead(net.num_features, num_classes))


def segmentation_hashes(job: Job) -> dict[str, str]:
    """Of the two splits in use."""
    config = job.protocols.segmentation
    splits = (config.train_split, config.val_split)
    return {split: open_segmentation(config, split).sha256 for split in splits}


def evaluate_segmentation(job: Job) -> dict[str, float]:
    """Trains on the training split; mIoU and mAcc on the other, single scale; a collective.

    Raises:
        UserError: the dataset is incomplete, torchmetrics is missing, or the net is no ResNet.
    """
    config = job.protocols.segmentation
    metrics = _metrics()
    train_set = open_segmentation(config, config.train_split)
    val_set = open_segmentation(config, config.val_split)
    torch.manual_seed(config.seed)  # of the head
    net = build_fcn(feature_net(job), train_set.num_classes).to(job.device).train()
    synchronise_batch_norm(net, process_group_for("global"))
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=config.rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )

    def loss(wrapped: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        images = torch.stack([image for image, _ in batch]).to(job.device)  # [B, 3, H, W]
        classes = torch.stack([classes for _, classes in batch]).to(job.device)  # [B, H, W]
        with autocast(job):
            scores = wrapped(images)["out"]  # [B, C, H, W]
        counted = (classes != IGNORED).sum().clamp(min=1)
        summed = F.cross_entropy(scores.float(), classes, ignore_index=IGNORED, reduction="sum")
        return summed / counted  # zero, not nan, for a batch of ignored pixels

    samples = TrainingSamples(train_set, config.crop_px, config.resize)
    plan = EpochPlan(len(train_set.pairs), config.batch, config.seed)
    training = Training(
        net,
        optimizer,
        lambda step: (1 - step / config.steps) ** config.power,
        loss,
        config.steps,
        config.checkpoint_every,
    )
    train(job, "fcn", training, training_batches(plan, samples, config.workers))
    return _measure(job, net.eval(), val_set, metrics)


@torch.no_grad()
def _measure(
    job: Job, net: nn.Module, images: SegmentationImages, metrics: Any
) -> dict[str, float]:
    """Whole images, one at a time; every rank its part."""
    settings = {"num_classes": images.num_classes, "ignore_index": IGNORED, "average": "macro"}
    miou = metrics.MulticlassJaccardIndex(**settings).to(job.device)
    macc = metrics.MulticlassAccuracy(**settings).to(job.device)
    for index in own_samples(len(images.pairs)):
        image, classes = images.load(index)
        with autocast(job):
            scores = net(normalised(image)[None].to(job.device))["out"].float()  # [1, C, H, W]
        predicted, wanted = scores.argmax(dim=1), classes[None].long().to(job.device)
        miou.update(predicted, wanted)
        macc.update(predicted, wanted)
    distributed.barrier()
    return {"miou": miou.compute().item(), "macc": macc.compute().item()}  # over all ranks


def _metrics() -> Any:
    try:
        from torchmetrics import classification
    except ImportError:
        raise UserError(f"segmentation needs torchmetrics: {INSTALL}") from None
    return classification
