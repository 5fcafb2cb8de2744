"""The weighted kNN classifier on frozen features."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.augment import MEAN, STD
from scale_smog.data.datasets import Images
from scale_smog.evaluation.accuracy import topk_correct
from scale_smog.evaluation.features import Encoder, embed_images, embed_share
from scale_smog.evaluation.splits import named_splits, random_subset

CHUNK_ROWS = 512
NORM_EPS = 1e-12  # of `F.normalize`
DEFAULTS = EvaluationConfig()  # of k and the temperature


def knn_votes(
    train_z: Tensor,
    train_y: Tensor,
    test_z: Tensor,
    *,
    k: int = DEFAULTS.k,
    temperature: float = DEFAULTS.temperature,
    num_classes: int | None = None,
    num_train: int | None = None,
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
        num_classes: C; by default those of `train_y`.
        num_train: of all ranks together: `train_z` is this rank's share, in unit rows, and the test
            images are the same on all; a collective.

    Returns:
        [M, C] float32, on the device of the features; the largest single vote of a row is 1, and
        0 is a class without any.
    """
    test_z = test_z.float()
    train_z = F.normalize(train_z.float()) if num_train is None else train_z
    train_y = train_y.to(train_z.device)
    num_classes = num_classes or int(train_y.max()) + 1
    num_votes = min(k, num_train or len(train_z))
    all_votes = test_z.new_zeros(len(test_z), num_classes)  # [M, C]
    rows_and_votes = zip(test_z.split(CHUNK_ROWS), all_votes.split(CHUNK_ROWS), strict=True)
    for rows, votes in rows_and_votes:
        similarity = F.normalize(rows) @ train_z.T  # [m, N]
        similarity, nearest = similarity.topk(min(num_votes, len(train_z)), dim=1)  # [m, k]
        classes = train_y[nearest]  # [m, k]
        if num_train is not None:  # the most similar of all ranks' most similar
            missing = (0, num_votes - similarity.shape[1])  # of a share of fewer images
            similarity = distributed.gather_columns(F.pad(similarity, missing, value=-math.inf))
            similarity, best = similarity.topk(num_votes, dim=1)
            classes = distributed.gather_columns(F.pad(classes, missing)).gather(1, best)
        # The largest weight is 1 whatever the temperature: no overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        weight.clamp_(min=torch.finfo(weight.dtype).tiny)  # a vote, however small
        votes.scatter_add_(1, classes, weight)
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
        train: the training split, if it is open.

    Raises:
        UserError: no test split, images without labels, or splits of other classes.
    """

    def __init__(
        self,
        data: DataConfig,
        config: EvaluationConfig,
        device: torch.device,
        train: Images | None = None,
    ):
        self._data, self._config, self._device = data, config, device
        bank, test = named_splits(data.path, "kNN", train).values()
        self._train = bank, random_subset(bank.num_samples, config.num_train_images)
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
        (train, train_ids), (test, test_ids) = self._train, self._test
        settings = self._data, self._config
        train_z, places = embed_share(encoder, *settings, train, train_ids, self._device)
        test_z = embed_images(encoder, *settings, test, test_ids, self._device)
        train_z /= train_z.norm(dim=1, keepdim=True).clamp_min_(NORM_EPS)  # too many for a copy
        train_y = torch.from_numpy(train.labels[train_ids])  # [N]
        votes = knn_votes(  # [M, C]
            train_z,
            train_y[torch.from_numpy(places)],
            test_z,
            k=self._config.k,
            temperature=self._config.temperature,
            num_classes=int(train_y.max()) + 1,
            num_train=len(train_y),
        )
        test_y = torch.from_numpy(test.labels[test_ids]).to(votes.device)
        scores = votes.log()[:, None]  # [M, 1, C]: a class without a vote is ruled out
        ((top1, top5),) = (topk_correct(scores, test_y) / len(test_y)).tolist()
        return top1, top5
