"""Top-1 and top-5 accuracy."""

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.data.datasets import Images
from scale_smog.evaluation.features import Encoder
from scale_smog.evaluation.supervised.crops import center_crops
from scale_smog.evaluation.task import EvaluationTask


@torch.no_grad()
def topk_accuracies(
    task: EvaluationTask, classify: Encoder, num_classifiers: int, dataset: Images, ids: np.ndarray
) -> list[tuple[float, float]]:
    """Top-1 and top-5 accuracy, 0 to 1, of L classifiers on centre crops; a collective.

    Args:
        task: size of the crops, and who decodes.
        classify: images [B, 3, H, W] -> logits [B, L, C].
        num_classifiers: L.
        dataset: labelled images.
        ids: which ones [N].
    """
    correct = torch.zeros(num_classifiers, 2, dtype=torch.float64, device=task.device)
    for images, labels in center_crops(task, dataset, ids):
        if len(labels):  # batch norm and others refuse an empty batch
            correct += topk_correct(classify(images), labels)
    correct = distributed.all_reduce(correct)
    return [(top1 / len(ids), top5 / len(ids)) for top1, top5 in correct.tolist()]


def topk_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of B images have their class first, and among the first five.

    Args:
        scores: [B, L, C] of L classifiers; -inf is a class that is ruled out.
        labels: [B] int64.

    Returns:
        [L, 2] float64.
    """
    values, top5 = scores.topk(min(5, scores.shape[2]), dim=2)  # [B, L, 5]
    correct = (top5 == labels[:, None, None]) & (values > -torch.inf)
    return torch.stack([correct[..., 0].sum(0), correct.any(2).sum(0)], dim=1).double()
