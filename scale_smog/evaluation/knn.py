"""The weighted kNN classifier on frozen features."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data import TarDataset, load_manifest
from scale_smog.errors import UserError
from scale_smog.evaluation.features import embed_images

CHUNK_ROWS = 512


def knn_predict(
    train_z: Tensor, train_y: Tensor, test_z: Tensor, *, k: int, temperature: float
) -> Tensor:
    """Classes by a vote of the k most similar training images.

    A neighbour votes exp(cosine / temperature) for its class (Wu et al., "Unsupervised feature
    learning via non-parametric instance discrimination", CVPR 2018, section 3.4).

    Args:
        train_z: features [N, F]; normalised here.
        train_y: classes [N] int64, 0 to C - 1.
        test_z: features [M, F].
        k: neighbours, at most N.
        temperature: of the votes.

    Returns:
        Predicted classes [M] int64, on the device of the features.
    """
    train_z, test_z = functional.normalize(train_z.float()), functional.normalize(test_z.float())
    train_y = train_y.to(train_z.device)
    num_classes = int(train_y.max()) + 1
    predicted = []
    for rows in test_z.split(CHUNK_ROWS):
        similarity, nearest = (rows @ train_z.T).topk(min(k, len(train_z)), dim=1)  # [m, k]
        votes = similarity.new_zeros(len(rows), num_classes)  # [m, C]
        # The largest weight is 1 whatever the temperature: no overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train_y[nearest], weight)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(
    train_z: Tensor,
    train_y: Tensor,
    test_z: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the test images [M] that `knn_predict` puts into their class, 0 to 1."""
    predicted = knn_predict(train_z, train_y, test_z, k=k, temperature=temperature)
    return (predicted.cpu() == test_y.cpu()).double().mean().item()


class KnnProbe:
    """kNN accuracy of any embedding on a labelled dataset, all ranks sharing the embedding work.

    Args:
        data: which images, and who decodes them.
        config: the evaluation section.
        device: of the embedding.

    Raises:
        UserError: no test split, or images without labels.
    """

    def __init__(self, data: DataConfig, config: EvaluationConfig, device: torch.device):
        self._data, self._config, self._device = data, config, device
        self._train = self._labelled(data.path, "train", config.num_train_images)
        self._test = self._labelled(data.path, test_split(data.path), config.num_test_images)

    @property
    def settings(self) -> dict[str, float]:
        """What an accuracy depends on besides the features, to keep beside it."""
        return self._config.model_dump(exclude={"batch", "baselines"})

    @staticmethod
    def _labelled(path: str, split: str, num_images: int) -> tuple[TarDataset, np.ndarray]:
        dataset = TarDataset(path, split)
        if (dataset.labels < 0).any():
            raise UserError(f"kNN needs labels, and split '{split}' of {path} has none")
        return dataset, np.arange(dataset.num_samples)[: num_images or None]

    def accuracy(self, embed: Callable[[Tensor], Tensor]) -> float:
        """Top-1 accuracy, 0 to 1, of features embed([B, 3, H, W]) -> [B, F]; a collective."""
        train_z, train_y = self._embed(embed, *self._train)
        test_z, test_y = self._embed(embed, *self._test)
        k, temperature = self._config.k, self._config.temperature
        return knn_accuracy(train_z, train_y, test_z, test_y, k, temperature)

    def _embed(
        self, embed: Callable[[Tensor], Tensor], dataset: TarDataset, ids: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        z = embed_images(embed, self._data, self._config, dataset, ids, self._device)
        return z, torch.from_numpy(dataset.labels[ids])


def test_split(path: str) -> str:
    """The split to test on: "test", else "val".

    Raises:
        UserError: the dataset has neither.
    """
    splits = load_manifest(path).splits
    for name in ("test", "val"):
        if name in splits:
            return name
    raise UserError(f"{path} has no split 'test' or 'val' to evaluate on; it has {list(splits)}")
