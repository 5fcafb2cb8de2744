"""The kNN classifier."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog.evaluation import knn_accuracy, knn_predict
from scale_smog.evaluation.features import raw_pixels
from scale_smog.evaluation.final import verdict
from scale_smog.evaluation.knn import knn_votes


def test_a_net_that_is_no_better_than_a_baseline_is_said_to_be():
    assert not verdict({"trained": 0.5}) and not verdict({})
    assert not verdict({"trained": 0.5, "raw_pixels": 0.4, "random": 0.3})
    assert not verdict({"trained": 1.0, "raw_pixels": 1.0})
    assert "When it collapses" in verdict({"trained": 0.3, "raw_pixels": 0.2, "random": 0.3})[1]


def clouds(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [num, 32] about seven centres, wide enough to overlap, and classes [num]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 32, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(7, (num,), generator=generator)
    return centres[classes] + 2.5 * torch.randn(num, 32, generator=generator), classes


def test_predictions_are_those_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    (train_z, train_y), (test_z, test_y) = clouds(3000, 0), clouds(2000, 1)
    oracle = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit(train_z.numpy(), train_y.numpy())
    expected = torch.from_numpy(oracle.predict(test_z.numpy()))
    predicted = knn_predict(train_z, train_y, test_z, k=20, temperature=0.07)
    assert (predicted == expected).double().mean() >= 0.999
    assert 0.4 < (expected == test_y).double().mean() < 0.99  # neither trivial nor hopeless
    accuracy = knn_accuracy(train_z, train_y, test_z, test_y, k=20, temperature=0.07)
    assert abs(accuracy - (expected == test_y).double().mean()) <= 0.001


def test_raw_pixels_are_the_image_up_to_32_px_and_its_means_above():
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(raw_pixels(images[..., :32, :]), images[..., :32, :].flatten(1))
    means = images.view(2, 3, 32, 2, 32).mean(dim=3).flatten(1)
    torch.testing.assert_close(raw_pixels(images), means)


def test_more_neighbours_than_images_are_all_of_them():
    (train_z, train_y), (test_z, _) = clouds(5, 0), clouds(40, 1)
    every = knn_predict(train_z, train_y, test_z, k=200, temperature=0.1)
    assert torch.equal(every, knn_predict(train_z, train_y, test_z, k=5, temperature=0.1))


def votes_of_a_share(num_train: int) -> torch.Tensor:
    (train_z, train_y), (test_z, _) = clouds(num_train, 0), clouds(700, 1)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    share = F.normalize(train_z[own])
    return knn_votes(share, train_y[own], test_z, k=20, num_classes=7, num_train=num_train)


@pytest.mark.parametrize("num_train", [300, 1])  # the second rank may hold none
def test_training_images_spread_over_ranks_vote_as_if_on_one(num_train):
    (train_z, train_y), (test_z, _) = clouds(num_train, 0), clouds(700, 1)
    expected = knn_votes(train_z, train_y, test_z, k=20, num_classes=7)
    for votes in run_on_ranks(2, votes_of_a_share, num_train):
        torch.testing.assert_close(votes, expected, rtol=1e-4, atol=1e-6)
