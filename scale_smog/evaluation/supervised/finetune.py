"""Semi-supervised evaluation: the whole net trained on a share of the labels (SMoG Table 4)."""

from bisect import bisect_right
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog.data.batch import Batch
from scale_smog.data.image_folder import Images
from scale_smog.errors import UserError
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.protocols import FinetuneConfig
from scale_smog.evaluation.splits import balanced_share, listed_samples, random_subset
from scale_smog.evaluation.supervised.classifiers import RATE_BATCH, accuracies, crops
from scale_smog.evaluation.supervised.training import Training, cosine, train
from scale_smog.models import process_group_for, synchronise_batch_norm

STEP_FACTOR = 0.2
LARGEST_MISMATCH = 0.2  # of a list's share of the labels and the setting's


class Classifier(nn.Module):
    """A backbone and a linear classifier that starts at zero."""

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, C] of images [B, 3, H, W]."""
        return self.head(self.backbone(images))


def evaluate_finetuned(
    job: Job, name: str, backbone: nn.Module, train_set: Images, test_set: Images
) -> dict[str, float]:
    """Top-1 and top-5 accuracy after fine-tuning on the labelled share; a collective.

    Args:
        job: settings and folder.
        name: of the net within the job.
        backbone: images [B, 3, H, W] -> features [B, F]; it is trained in place.
        train_set: labelled images, of which the share is taken.
        test_set: labelled images to judge on.

    Raises:
        UserError: the ranks do not divide the batch, or the list does not fit the images.
    """
    config = job.protocols.finetune
    ids = chosen_samples(config, train_set)
    batches, num_steps = crops(job, train_set, ids, config)
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    net = Classifier(backbone, num_features, train_set.num_classes)
    net.to(job.device).train()
    synchronise_batch_norm(net, process_group_for("global"))
    autocast = torch.autocast(
        job.device.type, torch.bfloat16, enabled=job.recipe.engine.precision == "bf16"
    )

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        with autocast:
            scores = wrapped(batch.large[0])
        return F.cross_entropy(scores.float(), batch.label.to(job.device))

    def scores(images: Tensor) -> Tensor:
        with autocast:
            return net(images).float()[:, None]  # [B, 1, C]

    rate = _rate(config, num_steps)
    training = Training(
        net, _optimizer(config, net), rate, loss, num_steps, config.checkpoint_every
    )
    train(job, name, training, batches)
    net.eval()
    test_ids = random_subset(test_set.num_samples, job.recipe.evaluation.num_test_images)
    ((top1, top5),) = accuracies(job, scores, test_set, test_ids)
    return {"top1": top1, "top5": top5, "num_labels": len(ids)}


def chosen_samples(config: FinetuneConfig, dataset: Images) -> np.ndarray:
    """The sample ids whose labels are used: of a list, else a balanced draw.

    Raises:
        UserError: the list does not fit the dataset.
    """
    if config.list:
        ids = listed_samples(dataset, config.list)
        share = len(ids) / dataset.num_samples
        if abs(share / config.share - 1) > LARGEST_MISMATCH:
            raise UserError(
                f"{config.list} names {share:.2g} of the images, and the setting is that of "
                f"finetune.share={config.share:g}: give finetune.share={share:.2g}"
            )
        return ids
    return balanced_share(dataset.labels, config.share, config.seed)


def _optimizer(config: FinetuneConfig, net: Classifier) -> torch.optim.SGD:
    scale = config.batch / RATE_BATCH
    groups = [
        {"params": list(net.backbone.parameters()), "lr": config.trunk_rate * scale},
        {"params": list(net.head.parameters()), "lr": config.head_rate * scale},
    ]
    return torch.optim.SGD(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _rate(config: FinetuneConfig, num_steps: int):
    if config.schedule == "cosine":
        return partial(cosine, num_steps=num_steps)
    steps = [epoch / config.epochs * num_steps for epoch in config.milestones]
    return lambda step: STEP_FACTOR ** bisect_right(steps, step)
