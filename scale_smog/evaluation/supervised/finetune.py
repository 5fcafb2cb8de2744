"""Semi-supervised evaluation: the whole net trained on a share of the labels (SMoG Table 4)."""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images
from scale_smog.errors import UserError
from scale_smog.evaluation.accuracy import topk_accuracies
from scale_smog.evaluation.protocols import FinetuneConfig
from scale_smog.evaluation.splits import random_subset
from scale_smog.evaluation.supervised.crops import random_crops
from scale_smog.evaluation.supervised.label_subsets import labelled_samples
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.evaluation.training import LR_BATCH, MOMENTUM, Training, cosine, train
from scale_smog.models import process_group_for, synchronise_batch_norm

MILESTONE_FACTOR = 0.2  # on the learning rate at each of SwAV's milestones
FEW_STEPS = 100  # with fewer a net has hardly left where it began


class Classifier(nn.Module):
    """A backbone and a linear classifier that starts at zero."""

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        return self.head(self.backbone(images))


def with_batch_of_labels(config: FinetuneConfig, num_labels: int) -> FinetuneConfig:
    """The settings with a batch of at most `num_labels` images, as many on each rank."""
    num_ranks = distributed.world_size()
    largest = max(1, num_labels // num_ranks) * num_ranks
    return config.model_copy(update={"batch": min(config.batch, largest)})


def evaluate_finetuned(
    task: EvaluationTask, name: str, backbone: nn.Module, train_set: Images, test_set: Images
) -> Results:
    """Top-1 and top-5 accuracy after fine-tuning on the labelled share; a collective.

    Args:
        task: settings and folder.
        name: of the net within the task.
        backbone: images [B, 3, H, W] -> features [B, F]; it is trained in place.
        train_set: labelled images, of which the share is taken.
        test_set: labelled images to test on.

    Raises:
        UserError: the ranks do not divide the batch, the list does not fit the images, or the
            batch is one image under batch norm.
    """
    config = task.protocols.finetune
    ids = labelled_samples(config, train_set)
    batches, num_steps = random_crops(task, train_set, ids, config)
    if distributed.is_main():
        print(_described(len(ids), num_steps, config.batch), flush=True)
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    net = Classifier(backbone, num_features, train_set.num_classes)
    if config.batch == 1 and any(isinstance(module, _BatchNorm) for module in net.modules()):
        raise UserError("finetune.batch=1: batch norm needs two images")
    net.to(task.device).train()
    synchronise_batch_norm(net, process_group_for("global"))

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        with task.autocast():
            logits = wrapped(batch.large[0])  # [B, C]
        return F.cross_entropy(logits.float(), batch.label.to(task.device))

    def classify(images: Tensor) -> Tensor:
        with task.autocast():
            return net(images).float()[:, None]  # [B, 1, C]

    optimizer, lr_factor = build_optimizer(config, net), lr_schedule(config, num_steps)
    training = Training(net, optimizer, lr_factor, loss, num_steps, config.checkpoint_every)
    train(task, name, training, batches)
    net.eval()
    num_test = task.recipe.evaluation.num_test_images
    test_ids = random_subset(test_set.num_samples, num_test)
    ((top1, top5),) = topk_accuracies(task, classify, 1, test_set, test_ids)
    return {"top1": top1, "top5": top5, "num_labels": len(ids)}


def _described(num_labels: int, num_steps: int, batch: int) -> str:
    """How long the training is, with a word where that is short."""
    line = f"finetune: {num_labels:,} labelled images, {num_steps:,} steps of {batch:,}"
    if num_steps >= FEW_STEPS:
        return line
    few = f"fewer than {FEW_STEPS} steps teach little"
    return f"{line}: {few}: raise finetune.epochs or lower finetune.batch"


def build_optimizer(config: FinetuneConfig, net: Classifier) -> torch.optim.SGD:
    """SGD with a learning rate for the backbone and one for the classifier."""
    scale = config.batch / LR_BATCH
    groups = [
        {"params": list(net.backbone.parameters()), "lr": config.trunk_rate * scale},
        {"params": list(net.head.parameters()), "lr": config.head_rate * scale},
    ]
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=config.nesterov)


def lr_schedule(config: FinetuneConfig, num_steps: int) -> Callable[[int], float]:
    """The factor on the learning rates at a step: a cosine, or a fall at each milestone."""
    if not config.milestones:
        return partial(cosine, num_steps=num_steps)
    steps = [epoch / config.epochs * num_steps for epoch in config.milestones]
    return lambda step: MILESTONE_FACTOR ** bisect_right(steps, step)
