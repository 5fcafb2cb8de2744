"""kNN and a linear classifier beside the training: on its own views, at next to no cost."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.evaluation.knn import knn_predict

KNN_EVERY = 10  # steps
QUEUE_ROWS = 4096  # newest features of this rank, among which neighbours are looked for
NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
RATE = 1e-3

Report = Callable[[int, dict[str, float]], None]


class OnlineProbe:
    """Judges every batch by what was learnt from earlier ones, then learns from it.

    It reads the backbone's features of the large view from the training's own forward pass, so it
    adds no pass of the backbone. Augmented views make its figures lower than those of centre crops:
    they are for the course of a run. Nothing of it is in a checkpoint; after a restart it needs
    some hundred steps.

    Args:
        backbone: the online net's; every rank's.
        num_features: size F of its output.
        num_classes: C.
        device: of the features.
    """

    def __init__(
        self, backbone: nn.Module, num_features: int, num_classes: int, device: torch.device
    ) -> None:
        self._head = nn.Linear(num_features, num_classes, device=device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._optimizer = torch.optim.Adam(self._head.parameters(), lr=RATE)
        self._queue = torch.zeros(0, num_features, device=device)
        self._queue_labels = torch.zeros(0, dtype=torch.int64, device=device)
        self._device = device
        self._counts = torch.zeros(2, 2, dtype=torch.float64, device=device)
        self._features: Tensor | None = None
        self._is_waiting = False
        backbone.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        # The first pass of a step is the large view's, of the first micro-batch; evaluations, and
        # small views, pass by.
        if self._is_waiting:
            self._features, self._is_waiting = output.detach(), False

    def watching(
        self, batches: Iterable[Batch], step: int, every: int, report: Report
    ) -> Iterator[Batch]:
        """The same batches; each is judged and learnt from when the next one is asked for.

        Args:
            batches: of the training.
            step: finished steps.
            every: steps between two reports.
            report: called with the finished steps and `online_knn`, `online_linear`, 0 to 1.
        """
        for batch in batches:
            self._is_waiting, self._features = True, None
            yield batch
            step += 1
            self._is_waiting = False
            if self._features is not None:
                self._learn(step, self._features.float(), batch.label)
            if step % every == 0:
                report(step, self._accuracies())

    def _learn(self, step: int, features: Tensor, labels: Tensor) -> None:
        labels = labels[: len(features)].to(self._device)
        # Features of one size: the rate then fits any net, at any time of its training.
        features = F.layer_norm(features, features.shape[1:])
        if step % KNN_EVERY == 0 and len(self._queue):
            found = knn_predict(
                self._queue,
                self._queue_labels,
                features,
                k=NUM_NEIGHBOURS,
                temperature=TEMPERATURE,
            )
            self._count(0, found, labels)
        scores = self._head(features)
        self._count(1, scores.argmax(dim=1), labels)
        self._optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(scores, labels).backward()
        for parameter in self._head.parameters():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad).div_(distributed.world_size())
        self._optimizer.step()
        self._queue = torch.cat([self._queue, features])[-QUEUE_ROWS:]
        self._queue_labels = torch.cat([self._queue_labels, labels])[-QUEUE_ROWS:]

    def _count(self, row: int, found: Tensor, labels: Tensor) -> None:
        self._counts[row, 0] += (found == labels).sum()
        self._counts[row, 1] += len(labels)

    def _accuracies(self) -> dict[str, float]:
        """Since the last report, over all ranks; the only wait for the device."""
        (knn, num_knn), (linear, num_linear) = distributed.all_reduce(self._counts).tolist()
        self._counts.zero_()
        figures = {"online_linear": linear / max(num_linear, 1)}
        return figures | ({"online_knn": knn / num_knn} if num_knn else {})
