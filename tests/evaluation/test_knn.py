"""The kNN classifier."""

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from scale_smog.evaluation import knn_accuracy, knn_predict


def clouds(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [num, 32] about seven centres, wide enough to overlap, and classes [num]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 32, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(7, (num,), generator=generator)
    return centres[classes] + 2.5 * torch.randn(num, 32, generator=generator), classes


def test_predictions_are_those_of_scikit_learn():
    (train_z, train_y), (test_z, test_y) = clouds(3000, 0), clouds(2000, 1)
    oracle = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit(train_z.numpy(), train_y.numpy())
    expected = torch.from_numpy(oracle.predict(test_z.numpy()))
    predicted = knn_predict(train_z, train_y, test_z, k=20, temperature=0.07)
    assert (predicted == expected).double().mean() >= 0.999
    assert 0.4 < (expected == test_y).double().mean() < 0.99  # neither trivial nor hopeless
    accuracy = knn_accuracy(train_z, train_y, test_z, test_y, k=20, temperature=0.07)
    assert abs(accuracy - (expected == test_y).double().mean()) <= 0.001


def test_more_neighbours_than_images_are_all_of_them():
    (train_z, train_y), (test_z, _) = clouds(5, 0), clouds(40, 1)
    every = knn_predict(train_z, train_y, test_z, k=200, temperature=0.1)
    assert torch.equal(every, knn_predict(train_z, train_y, test_z, k=5, temperature=0.1))
