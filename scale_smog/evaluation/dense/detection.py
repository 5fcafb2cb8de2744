"""Mask R-CNN with a feature pyramid on the checkpoint's ResNet: COCO (SMoG Table 6)."""

import contextlib
import io
import json
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from scale_smog import distributed
from scale_smog.data import EpochPlan
from scale_smog.data.plan import images_per_rank
from scale_smog.errors import UserError
from scale_smog.evaluation.dense.batches import own_samples, training_batches
from scale_smog.evaluation.dense.detection_data import DetectionImages, TrainingSamples
from scale_smog.evaluation.dense.feature_maps import require_resnet, stage_channels, stage_names
from scale_smog.evaluation.dense.requirements import import_pycocotools
from scale_smog.evaluation.protocols import DetectionConfig
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.evaluation.training import MOMENTUM, Training, train
from scale_smog.models import process_group_for, synchronise_batch_norm
from scale_smog.models.resnet import ResNet
from scale_smog.runtime.files import write_atomically

PYRAMID_CHANNELS = 256
BOX_FEATURES = 1024
WEIGHT_DECAY = 1e-4
STEP_FACTOR = 0.1
DETECTIONS_FILE = "detections.json"


class Pyramid(BackboneWithFPN):
    """A ResNet and its feature pyramid under autocast: images [B, 3, H, W] to float32 maps.

    In torchvision anchors, boxes and the truth take the maps' dtype, and bf16 knows coordinates of
    about 1,000 px to 4 px only.

    Args:
        autocast: the context of the forward pass.
        *args, **options: of torchvision's `BackboneWithFPN`.
    """

    def __init__(self, autocast: Callable[[], torch.autocast], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._autocast = autocast

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps [B, C, h, w] by their names, the finest first."""
        with self._autocast():
            maps = super().forward(x)
        return {name: each.float() for name, each in maps.items()}


def build_mask_rcnn(
    net: ResNet,
    num_categories: int,
    config: DetectionConfig,
    autocast: Callable[[], torch.autocast],
) -> MaskRCNN:
    """torchvision's Mask R-CNN with batch norm in pyramid and heads, every layer trained.

    Args:
        net: of ImageNet's kind, trained in place.
        num_categories: without the background.
        config: sizes of the images.
        autocast: for backbone and pyramid; the rest is float32.
    """
    names, width = stage_names(net)[-4:], PYRAMID_CHANNELS
    pyramid = Pyramid(
        autocast,
        net,
        {name: str(i) for i, name in enumerate(names)},
        stage_channels(net)[-4:],
        width,
        norm_layer=nn.BatchNorm2d,
    )
    convs = [width] * 4
    return MaskRCNN(
        pyramid,
        min_size=config.shorter_px,  # pyright: ignore[reportArgumentType]  # or a sequence
        max_size=config.longer_px,
        box_head=FastRCNNConvFCHead((width, 7, 7), convs, [BOX_FEATURES], nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(BOX_FEATURES, 1 + num_categories),
        mask_head=MaskRCNNHeads(width, convs, 1, nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, 1 + num_categories),
        **_anchors(len(names)),
    )


def evaluate_detection(
    task: EvaluationTask, train_set: DetectionImages, val_set: DetectionImages
) -> Results:
    """Trains on the images with objects; AP of boxes and masks on the others; a collective.

    Raises:
        UserError: the splits differ in categories, no image has an object, the ranks do not divide
            the batch, or the net is no ResNet.
    """
    config = task.protocols.detection
    images_per_rank(config.batch, distributed.world_size(), "detection.batch")
    train_set = train_set.with_objects()
    if train_set.names != val_set.names or train_set.categories != val_set.categories:
        odd = set(train_set.names) ^ set(val_set.names) or {"their ids"}
        raise UserError(
            f"{config.path}: the categories of {config.train_split} and {config.val_split} do not "
            f"match: {', '.join(sorted(odd)[:3])}"
        )
    torch.manual_seed(config.seed)  # of pyramid and heads
    backbone = require_resnet(task.backbone(), task.name)
    net = build_mask_rcnn(backbone, len(train_set.names), config, task.autocast)
    net.to(task.device).train()
    synchronise_batch_norm(net, process_group_for("global"))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def loss(wrapped: nn.Module, batch: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        images = [image.to(task.device) for image, _ in batch]
        targets = [{k: v.to(task.device) for k, v in target.items()} for _, target in batch]
        losses: dict[str, Tensor] = wrapped(images, targets)
        return torch.stack(list(losses.values())).sum()

    plan = EpochPlan(len(train_set.ids), config.batch, config.seed)
    batches = training_batches(plan, TrainingSamples(train_set), config.workers)
    schedule = partial(lr_factor, config)
    training = Training(net, optimizer, schedule, loss, config.steps, config.checkpoint_every)
    train(task, "mask_rcnn", training, batches)
    setattr(net.transform, "min_size", (config.test_px,))  # noqa: B010  # for pyright a module
    found = _detect(task, net.eval(), val_set)
    if distributed.is_main():
        write_atomically(task.made_folder() / DETECTIONS_FILE, json.dumps(found).encode())
    return {
        f"{kind}_{name}": value
        for kind, iou_type in (("box", "bbox"), ("mask", "segm"))
        for name, value in average_precision(val_set, found, iou_type).items()
    }


def lr_factor(config: DetectionConfig, step: int) -> float:
    """Linear warm-up from 1 / (warmup + 1), then a tenth at each milestone."""
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    return warmup * STEP_FACTOR ** bisect_right(config.milestones, step)


def average_precision(
    images: DetectionImages, found: list[dict[str, Any]], iou_type: str
) -> dict[str, float]:
    """AP, AP50 and AP75 by pycocotools.

    Args:
        images: with the truth.
        found: detections in COCO's result format.
        iou_type: "bbox" or "segm".
    """
    if not found:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    _, cocoeval, _ = import_pycocotools()
    with contextlib.redirect_stdout(io.StringIO()):  # its own tables
        evaluation = cocoeval.COCOeval(images.coco, images.coco.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), map(float, evaluation.stats[:3]), strict=True))


@torch.no_grad()
def _detect(task: EvaluationTask, net: nn.Module, images: DetectionImages) -> list[dict[str, Any]]:
    """Detections of all images in COCO's result format, on every rank."""
    own = []
    for index in own_samples(len(images.ids)):
        image = images.image(index).to(task.device).float() / 255
        (output,) = net([image])
        own += as_results(images, images.ids[index], output)
    gathered = distributed.gather_objects(own)
    return sorted((x for results in gathered for x in results), key=lambda x: x["image_id"])


def as_results(
    images: DetectionImages, image_id: int, output: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """torchvision's output for an image in COCO's result format."""
    _, _, mask_tools = import_pycocotools()
    boxes = output["boxes"].cpu()
    boxes[:, 2:] -= boxes[:, :2]  # left, top, width, height
    masks = (output["masks"][:, 0] > 0.5).cpu().to(torch.uint8).numpy()  # [N, H, W]
    results = []
    for box, score, label, mask in zip(
        boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), masks, strict=True
    ):
        encoded = mask_tools.encode(mask.copy(order="F"))
        results.append(
            {
                "image_id": image_id,
                "category_id": images.categories[label - 1],
                "bbox": box,
                "score": score,
                "segmentation": {**encoded, "counts": encoded["counts"].decode()},
            }
        )
    return results


def _anchors(num_maps: int) -> dict[str, Any]:
    """torchvision expects four maps and a pooled one; nets with fewer stages have fewer sizes."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    sizes = tuple((32 * 2**i,) for i in range(num_maps + 1))
    names = [str(i) for i in range(num_maps)]
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
    }
