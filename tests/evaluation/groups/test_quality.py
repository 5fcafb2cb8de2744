"""Purity of groups."""

import math

import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog.evaluation.groups.quality import cluster_features, group_quality


def test_entropies_are_of_the_classes_inside_the_groups_in_use():
    groups = torch.tensor([0, 0, 0, 0, 2, 2])
    classes = torch.tensor([1, 1, 1, 1, 0, 3])
    quality = group_quality(groups, classes, num_groups=4)
    assert quality.sizes.tolist() == [4, 2]
    assert torch.allclose(quality.entropy, torch.tensor([0, math.log(2)], dtype=torch.float64))
    assert abs(quality.entropy_mean - math.log(2) / 2) < 1e-12
    assert abs(quality.entropy_weighted - math.log(2) / 3) < 1e-12
    assert quality.results["low_entropy_groups"] == quality.results["low_entropy_images"] == 1
    mixed = group_quality(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 1]), num_groups=2)
    assert (mixed.low_entropy_groups, mixed.low_entropy_images) == (0.5, 0.25)
    assert quality.results["in_use"] == 2 and quality.results["largest_share"] == 4 / 6


def test_mutual_information_is_that_of_scikit_learn():
    from sklearn.metrics import normalized_mutual_info_score

    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(7, (500,), generator=generator)
    groups = (classes * 3 + torch.randint(5, (500,), generator=generator)) % 40
    expected = normalized_mutual_info_score(classes, groups)
    assert abs(group_quality(groups, classes, 40).nmi - expected) < 1e-12


def test_groups_and_classes_that_say_nothing_share_nothing():
    assert group_quality(torch.zeros(9, dtype=torch.int64), torch.arange(9) % 3, 2).nmi == 0
    assert group_quality(torch.arange(9) % 3, torch.arange(9) % 3, 3).nmi == 1


def test_features_without_groups_are_clustered():
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 16, generator=generator))
    classes = torch.arange(200) % 5
    features = centres[classes] + 0.05 * torch.randn(200, 16, generator=generator)
    groups = cluster_features(features * 7, num_groups=20)
    assert group_quality(groups, classes, 20).entropy_weighted < 0.05


def clustered() -> torch.Tensor:
    rows = F.normalize(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
    return cluster_features(rows, num_groups=5)


def test_ranks_cluster_parts_that_are_not_equally_many():
    expected = clustered()
    for found in run_on_ranks(3, clustered):
        assert torch.equal(found, expected)
