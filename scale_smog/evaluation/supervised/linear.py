"""A linear classifier on frozen features: several learning rates on one forward pass."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images
from scale_smog.evaluation.accuracy import topk_accuracies
from scale_smog.evaluation.features import Encoder
from scale_smog.evaluation.protocols import LinearConfig
from scale_smog.evaluation.splits import random_subset
from scale_smog.evaluation.supervised.crops import random_crops
from scale_smog.evaluation.supervised.label_subsets import hold_out
from scale_smog.evaluation.supervised.logistic import fit_logistic
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.evaluation.training import LR_BATCH, MOMENTUM, Training, cosine, train


class LinearHeads(nn.Module):
    """L linear classifiers of the same features, one matrix product for all of them.

    Args:
        num_heads: L.
        num_features: F.
        num_classes: C.
    """

    def __init__(self, num_heads: int, num_features: int, num_classes: int) -> None:
        super().__init__()
        shape = (num_classes, num_features)
        self.weights = nn.ParameterList(torch.zeros(shape) for _ in range(num_heads))
        self.biases = nn.ParameterList(torch.zeros(num_classes) for _ in range(num_heads))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, L, C] of features [B, F]."""
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))  # [L * C, F]
        return F.linear(features, weight, bias).unflatten(1, (len(self.weights), -1))


def evaluate_linear(
    task: EvaluationTask, name: str, encoder: Encoder, train_set: Images, test_set: Images
) -> Results:
    """Top-1 and top-5 accuracy of the linear classifier on one frozen net; a collective.

    Args:
        task: settings and folder.
        name: of the net within the task.
        encoder: images [B, 3, H, W] -> features [B, F].
        train_set: labelled images to train on.
        test_set: labelled images to test on.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    config = task.protocols.linear
    num_test = task.recipe.evaluation.num_test_images
    test_ids = random_subset(test_set.num_samples, num_test)
    if config.setting == "logistic":
        classify = _fit_logistic(task, encoder, train_set)
        ((top1, top5),) = topk_accuracies(task, classify, 1, test_set, test_ids)
        return {"top1": top1, "top5": top5, "inverse_penalty": config.inverse_penalty}

    rates = config.learning_rates
    train_ids, choice_ids = _hold_out(task, train_set)
    heads = _train_heads(task, name, encoder, train_set, train_ids)

    def classify_all(images: Tensor) -> Tensor:
        return heads(encoder(images).float())  # [B, L, C]

    by_rate = topk_accuracies(task, classify_all, len(rates), test_set, test_ids)
    if len(rates) == 1:
        ((top1, top5),) = by_rate
        return {"top1": top1, "top5": top5, "learning_rate": rates[0]}
    by_choice = topk_accuracies(task, classify_all, len(rates), train_set, choice_ids)
    best = max(range(len(rates)), key=lambda i: by_choice[i])
    top1, top5 = by_rate[best]
    each = {f"top1_at_{rate:g}": top1 for rate, (top1, _) in zip(rates, by_rate, strict=True)}
    return {"top1": top1, "top5": top5, "learning_rate": rates[best], **each}


def _hold_out(task: EvaluationTask, train_set: Images) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids to train on, and those by which one of several learning rates is chosen."""
    config, labels = task.protocols.linear, train_set.labels
    if len(config.learning_rates) == 1:
        return np.arange(len(labels)), np.zeros(0, dtype=np.int64)
    train_ids, held_out = hold_out(labels, config.held_out, config.seed)
    num_classes, num_left_out = len(np.unique(labels)), len(np.unique(labels[held_out]))
    if distributed.is_main() and num_left_out < num_classes:
        print(
            f"linear: {num_classes - num_left_out} of {num_classes} classes are too small to hold "
            f"out {config.held_out:g} of: the learning rate is chosen by the "
            + ("other classes" if len(held_out) else "training images"),
            flush=True,
        )
    return train_ids, held_out if len(held_out) else train_ids


def build_heads(
    config: LinearConfig, num_features: int, num_classes: int, device: torch.device
) -> tuple[LinearHeads, torch.optim.SGD]:
    """A classifier for each learning rate, and the optimizer that gives each its own."""
    heads = LinearHeads(len(config.learning_rates), num_features, num_classes).to(device)
    groups = [
        {"params": [weight, bias], "lr": rate * config.batch / LR_BATCH}
        for weight, bias, rate in zip(
            heads.weights, heads.biases, config.learning_rates, strict=True
        )
    ]
    optimizer = torch.optim.SGD(
        groups, momentum=MOMENTUM, nesterov=config.nesterov, weight_decay=config.weight_decay
    )
    return heads, optimizer


def _train_heads(
    task: EvaluationTask, name: str, encoder: Encoder, dataset: Images, ids: np.ndarray
) -> LinearHeads:
    config, px = task.protocols.linear, task.recipe.evaluation.image_px
    batches, num_steps = random_crops(task, dataset, ids, config)
    num_features = encoder(torch.zeros(1, 3, px, px, device=task.device)).shape[1]
    heads, optimizer = build_heads(config, num_features, dataset.num_classes, task.device)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(encoder(batch.large[0]).float())  # [B, L, C]
        labels = batch.label.to(task.device)[:, None].expand(logits.shape[:2])  # [B, L]
        # The mean over B x L times L: every head's gradient is that of its own mean loss.
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * logits.shape[1]

    lr_factor = partial(cosine, num_steps=num_steps)
    training = Training(heads, optimizer, lr_factor, loss, num_steps, config.checkpoint_every)
    train(task, name, training, batches)
    return heads


def _fit_logistic(task: EvaluationTask, encoder: Encoder, dataset: Images) -> Encoder:
    """Fitted on centre crops of all images: images [B, 3, H, W] -> logits [B, 1, C] float64."""
    z = task.embed(encoder, dataset, np.arange(dataset.num_samples))
    y = torch.from_numpy(dataset.labels).to(task.device)
    penalty = task.protocols.linear.inverse_penalty
    weight, bias = fit_logistic(z, y, dataset.num_classes, penalty)
    return lambda images: F.linear(encoder(images).double(), weight, bias)[:, None]
