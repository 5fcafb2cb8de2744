"""The weighted kNN classifier on frozen features."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.augment import MEAN, STD
from scale_smog.data.datasets import Images
from scale_smog.evaluation.accuracy import topk_correct
from scale_smog.evaluation.features import Encoder, embed_images
from scale_smog.evaluation.splits import open_labelled_splits, random_subset

CHUNK_ROWS = 512
DEFAULTS = EvaluationConfig()  # of k and the temperature


def knn_votes(
    train_z: Tensor,
    train_y: Tensor,
    test_z: Tensor,
    *,
    k: int = DEFAULTS.k,
    temperature: float = DEFAULTS.temperature,
) -> Tensor:
    """Votes for each class by the k most similar training images.

    A neighbour votes exp(cosine / temperature) for its class (Wu et al., "Unsupervised feature
    learning via non-parametric instance discrimination", CVPR 2018, section 3.4).

    Args:
        train_z: features [N, F]; normalised here.
        train_y: classes [N] int64, 0 to C - 1.
        test_z: features [M, F].
        k: neighbours, at most N.
        temperature: of the votes.

    Returns:
        [M, C] float32, on the device of the features; the largest single vote of a row is 1, and
        0 is a class without any.
    """
    train_z, test_z = F.normalize(train_z.float()), F.normalize(test_z.float())
    train_y = train_y.to(train_z.device)
    num_classes = int(train_y.max()) + 1
    all_votes = test_z.new_zeros(len(test_z), num_classes)  # [M, C]
    rows_and_votes = zip(test_z.split(CHUNK_ROWS), all_votes.split(CHUNK_ROWS), strict=True)
    for rows, votes in rows_and_votes:
        similarity, nearest = (rows @ train_z.T).topk(min(k, len(train_z)), dim=1)  # [m, k]
        # The largest weight is 1 whatever the temperature: no overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        weight.clamp_(min=torch.finfo(weight.dtype).tiny)  # a vote, however small
        votes.scatter_add_(1, train_y[nearest], weight)
    return all_votes


def knn_predict(
    train_z: Tensor,
    train_y: Tensor,
    test_z: Tensor,
    *,
    k: int = DEFAULTS.k,
    temperature: float = DEFAULTS.temperature,
) -> Tensor:
    """Classes [M] int64 with the most votes; arguments as of `knn_votes`."""
    return knn_votes(train_z, train_y, test_z, k=k, temperature=temperature).argmax(dim=1)


def knn_accuracy(
    train_z: Tensor,
    train_y: Tensor,
    test_z: Tensor,
    test_y: Tensor,
    k: int = DEFAULTS.k,
    temperature: float = DEFAULTS.temperature,
) -> float:
    """Share of the test images [M] that `knn_predict` puts into their class, 0 to 1."""
    predicted = knn_predict(train_z, train_y, test_z, k=k, temperature=temperature)
    return (predicted.cpu() == test_y.cpu()).double().mean().item()


class KnnProbe:
    """kNN accuracy of any encoder on a labelled dataset, all ranks sharing the work.

    Args:
        data: which images, and who decodes them.
        config: the evaluation section.
        device: of the encoder.

    Raises:
        UserError: no test split, images without labels, or splits of other classes.
    """

    def __init__(self, data: DataConfig, config: EvaluationConfig, device: torch.device):
        self._data, self._config, self._device = data, config, device
        train, test = open_labelled_splits(data.path, "kNN")
        self._train = train, random_subset(train.num_samples, config.num_train_images)
        self._test = test, random_subset(test.num_samples, config.num_test_images)

    @property
    def settings(self) -> dict[str, Any]:
        """What an accuracy depends on besides the features, to keep beside it."""
        pixels = {"pixel_mean": MEAN.tolist(), "pixel_std": STD.tolist()}
        return self._config.model_dump(exclude={"batch", "baselines"}) | pixels

    def accuracy(self, encoder: Encoder) -> float:
        """Top-1 accuracy, 0 to 1, of features encoder([B, 3, H, W]) -> [B, F]; a collective."""
        return self.accuracies(encoder)[0]

    def accuracies(self, encoder: Encoder) -> tuple[float, float]:
        """Top-1 and top-5 accuracy; a collective."""
        train_z, train_y = self._embed(encoder, *self._train)
        test_z, test_y = self._embed(encoder, *self._test)
        part = slice(distributed.rank(), None, distributed.world_size())
        k, temperature = self._config.k, self._config.temperature
        votes = knn_votes(train_z, train_y, test_z[part], k=k, temperature=temperature)  # [m, C]
        scores = votes.log()[:, None]  # [m, 1, C]: a class without a vote is ruled out
        correct = topk_correct(scores, test_y[part].to(votes.device))  # [1, 2]
        ((top1, top5),) = (distributed.all_reduce(correct) / len(test_y)).tolist()
        return top1, top5

    def _embed(self, encoder: Encoder, dataset: Images, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        z = embed_images(encoder, self._data, self._config, dataset, ids, self._device)
        return z, torch.from_numpy(dataset.labels[ids])
