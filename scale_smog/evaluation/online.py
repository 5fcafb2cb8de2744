"""kNN and a linear classifier beside the training: on its own views, at next to no cost."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.evaluation.knn import knn_votes

KNN_EVERY = 10  # steps
QUEUE_ROWS = 4096  # newest features of this rank, among which neighbours are looked for
LEARNING_RATE = 1e-3


class OnlineProbe:
    """Evaluates every batch by what was learnt from earlier ones, then learns from it.

    The features are those of the training's own forward pass of a large view, so the backbone
    makes no further one. Augmented views make the accuracies lower than those of centre crops: they
    are for the course of a run. Nothing of it is in a checkpoint; after a restart it needs some
    hundred steps.

    Args:
        num_features: size F of the backbone's output.
        num_classes: C.
        device: of the features.
    """

    def __init__(self, num_features: int, num_classes: int, device: torch.device) -> None:
        self._head = nn.Linear(num_features, num_classes, device=device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._optimizer = torch.optim.Adam(self._head.parameters(), lr=LEARNING_RATE)
        self._queue = torch.zeros(0, num_features, device=device)
        self._queue_labels = torch.zeros(0, dtype=torch.int64, device=device)
        # Correct predictions and predictions since the last report.
        self._knn_counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._linear_counts = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, step: int, features: Tensor, labels: Tensor) -> None:
        """Evaluates a batch, then learns from it; a collective.

        Args:
            step: finished steps; kNN takes part in every tenth.
            features: of this rank's images [B, F], detached, of any float dtype.
            labels: [B] int64.
        """
        # Features of one size: the learning rate then fits any net, at any time of its training.
        features = F.layer_norm(features.float(), features.shape[1:])
        labels = labels.to(features.device)
        if step % KNN_EVERY == 0 and len(self._queue):
            votes = knn_votes(
                self._queue, self._queue_labels, features, num_classes=self._head.out_features
            )  # [B, C]; the number of classes is given, as to ask for it would wait for the device
            _count(self._knn_counts, votes.argmax(dim=1), labels)
        logits = self._head(features)  # [B, C]
        _count(self._linear_counts, logits.argmax(dim=1), labels)
        self._train_head(F.cross_entropy(logits, labels))
        self._queue = torch.cat([self._queue, features])[-QUEUE_ROWS:]
        self._queue_labels = torch.cat([self._queue_labels, labels])[-QUEUE_ROWS:]

    def accuracies(self) -> dict[str, float]:
        """`online_linear` and, where it took part, `online_knn`, 0 to 1, since the last call.

        A collective, and the only wait for the device.
        """
        counts = torch.stack([self._knn_counts, self._linear_counts])
        (knn, num_knn), (linear, num_linear) = distributed.all_reduce(counts).tolist()
        self._knn_counts.zero_()
        self._linear_counts.zero_()
        accuracies = {"online_linear": linear / max(num_linear, 1)}
        return accuracies | ({"online_knn": knn / num_knn} if num_knn else {})

    def _train_head(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self._head.parameters():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad).div_(distributed.world_size())
        self._optimizer.step()


def _count(counts: Tensor, predicted: Tensor, labels: Tensor) -> None:
    counts[0] += (predicted == labels).sum()
    counts[1] += len(labels)
