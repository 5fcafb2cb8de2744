"""Losses and codes are those of other people's code, with their gradients, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog.methods.byol import regression_loss
from scale_smog.methods.moco_v3 import symmetrised_loss
from scale_smog.methods.simclr import nt_xent_loss
from scale_smog.methods.swav import sinkhorn, swapped_prediction_loss

BATCH, DIM, NUM_PROTOTYPES, TEMPERATURE = 12, 8, 10, 0.3


@pytest.fixture(scope="module")
def lightly_loss() -> Any:
    return pytest.importorskip("lightly.loss", reason="lightly is an extra")


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def raw(*shape: int, seed: int) -> Tensor:
    """Not of length one: lightly's losses make it so, ours are given what is."""
    return (3 * unit(*shape, seed=seed)).requires_grad_()


def assert_alike(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """Value, and gradient with respect to each input."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_simclrs_loss_is_lightlys(lightly_loss):
    x = raw(2, BATCH, DIM, seed=0)
    theirs = lightly_loss.NTXentLoss(temperature=TEMPERATURE)(x[0], x[1])
    assert_alike(nt_xent_loss(F.normalize(x, dim=-1), TEMPERATURE), theirs, x)


def test_byols_loss_is_lightlys(lightly_loss):
    """Lightly's is the negative cosine of one direction; ours 2 - 2 cos, of both."""
    x, targets = raw(2, BATCH, DIM, seed=0), unit(2, BATCH, DIM, seed=1)
    criterion = lightly_loss.NegativeCosineSimilarity()
    theirs = sum(2 + 2 * criterion(mine, other) for mine, other in zip(x, targets, strict=True))
    assert isinstance(theirs, Tensor)
    assert_alike(regression_loss(F.normalize(x, dim=-1), targets), theirs, x)


def test_moco_v3s_loss_is_lightlys_against_the_other_images_keys(lightly_loss):
    x, keys = raw(2, BATCH, DIM, seed=0), unit(2, BATCH, DIM, seed=1)
    losses = []
    for query, key in zip(x, keys, strict=True):
        for i in range(BATCH):  # lightly's has one set of negatives for all: image by image, then
            bank = lightly_loss.NTXentLoss(TEMPERATURE, memory_bank_size=(BATCH - 1, DIM))
            others = torch.arange(BATCH) != i
            bank.memory_bank.bank = key[others]
            losses.append(bank(query[i : i + 1], key[i : i + 1]))
    theirs = 2 * TEMPERATURE * torch.stack(losses).sum() / BATCH
    queries = F.normalize(x, dim=-1)
    assert_alike(symmetrised_loss(queries, keys, TEMPERATURE), theirs, x)


@pytest.mark.parametrize("num_small", [0, 3])
@pytest.mark.parametrize("num_queued", [0, 20])
def test_swavs_codes_and_loss_are_lightlys(lightly_loss, num_small, num_queued):
    z = unit(2 + num_small, BATCH, DIM, seed=0).requires_grad_()
    prototypes = unit(NUM_PROTOTYPES, DIM, seed=1).requires_grad_()
    queued = unit(2, num_queued, DIM, seed=2) @ prototypes.detach().T
    scores = z @ prototypes.T  # [V, B, K]
    codes = sinkhorn(torch.cat([queued, scores[:2].detach()], dim=1), 0.05)[:, num_queued:]
    criterion = lightly_loss.SwaVLoss(TEMPERATURE, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    before = list(queued) if num_queued else None
    again = z @ prototypes.T
    theirs = criterion(list(again[:2]), list(again[2:]), before)
    ours = swapped_prediction_loss(scores, codes, TEMPERATURE)
    assert_alike(ours, theirs.squeeze(), z, prototypes)


def numpys_sinkhorn(scores: np.ndarray, epsilon: float, rounds: int) -> np.ndarray:
    """SwAV's Eqs. 3 to 5 as they stand: rows to 1 / K, columns to 1 / B."""
    q = np.exp(scores / epsilon).T  # [K, B]
    num_prototypes, batch = q.shape
    q /= q.sum()
    for _ in range(rounds):
        q *= (1 / num_prototypes) / q.sum(axis=1, keepdims=True)
        q *= (1 / batch) / q.sum(axis=0, keepdims=True)
    return q.T * batch


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_codes_are_those_of_sinkhorn_in_numpy(rounds):
    scores = unit(BATCH, DIM, seed=0) @ unit(NUM_PROTOTYPES, DIM, seed=1).T
    codes = sinkhorn(scores, 0.05, rounds)
    expected = numpys_sinkhorn(scores.numpy(), 0.05, rounds)
    np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-10)
    if rounds == 100:  # then balanced
        np.testing.assert_allclose(codes.sum(0), BATCH / NUM_PROTOTYPES, rtol=1e-3)
