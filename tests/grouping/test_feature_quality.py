"""Quality of features without labels, against the formulas of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.grouping.quality import effective_rank, effective_rank_of_few, uniformity


def rankme(features: torch.Tensor) -> float:
    """As Garrido et al. print it."""
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return math.exp(-(shares * shares.log()).sum())


def features(num: int = 600, dim: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.01, 1, dim)
    return F.normalize(torch.randn(num, dim, generator=generator) * scales)


def test_effective_rank_is_rankme():
    assert effective_rank(features()) == pytest.approx(rankme(features()), rel=1e-6)
    few = effective_rank_of_few(features(24), 24)  # fewer rows than dimensions
    assert few == pytest.approx(rankme(features(24)), rel=1e-4)


def test_a_collapse_has_rank_one_and_an_even_spread_all_dimensions():
    point = F.normalize(torch.ones(500, 16))
    assert effective_rank(point) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(500, 16)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(16).repeat(30, 1)) == pytest.approx(16, abs=1e-3)


def test_uniformity_is_the_mean_kernel_over_pairs():
    rows = features(100)
    expected = (-2 * torch.pdist(rows).square()).exp().mean().log().item()
    assert uniformity(rows).item() == pytest.approx(expected, abs=1e-5)
    assert uniformity(F.normalize(torch.ones(10, 8))).item() == pytest.approx(0, abs=1e-5)
    assert uniformity(rows[:1]).isnan()  # no pair


def figures_of_my_part() -> tuple[float, float]:
    rows = features(128).chunk(2)[distributed.rank()]
    return effective_rank(rows), effective_rank_of_few(rows, 128)


def test_two_ranks_see_what_one_would():
    (whole, few), _ = run_on_ranks(2, figures_of_my_part)
    expected = rankme(features(128))
    assert whole == pytest.approx(expected, rel=1e-6)
    assert few == pytest.approx(expected, rel=3e-4)  # more values of epsilon
