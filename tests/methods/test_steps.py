"""What a step of each method does with the two nets, the prototypes and the queue."""

from pathlib import Path

import engine_runs as runs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog.loop import train_step
from scale_smog.methods.base import cosine_ema
from scale_smog.methods.swav import PROTOTYPES, Swav, sinkhorn
from scale_smog.state import TrainState


def state_of(folder: Path, **method: object) -> TrainState:
    return runs.build_state(runs.recipe_of(folder, precision="fp64", method=method))


def step(state: TrainState, num: int = 1) -> None:
    """The next ones of twice as many as an epoch has."""
    recipe = state.method.recipe
    schedules = runs.schedules_of(recipe, runs.NUM_STEPS)
    batches = runs.batches(state.step, recipe.data.num_small_crops)
    for _, batch in zip(range(num), batches, strict=False):
        assert train_step(state, batch, schedules.at(state.step)).is_applied


@pytest.mark.parametrize("name", ["moco_v3", "byol"])
def test_each_view_is_compared_with_the_other(tmp_path, name, monkeypatch):
    state = state_of(tmp_path, name=name)
    seen: list[Tensor] = []
    real = state.engine.forward_momentum
    monkeypatch.setattr(state.engine, "forward_momentum", lambda x: seen.append(x) or real(x))
    step(state)
    first, second = next(runs.batches(0, 0)).large
    assert [torch.equal(a, b) for a, b in zip(seen, (second, first), strict=True)] == [True, True]


def test_codes_of_an_epsilon_too_small_for_the_type_are_numbers():
    scores = torch.tensor([[0.9, -0.9, 0.1], [0.8, -0.95, 0.2]])  # nobody is near the second
    codes = sinkhorn(scores, 0.005)
    assert codes.isfinite().all() and codes[:, 1].sum() == 0
    assert (codes.sum(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["moco_v3", "byol"])
def test_the_momentum_net_follows_at_an_alpha_that_rises_to_one(tmp_path, name, monkeypatch):
    state = state_of(tmp_path, name=name)
    alphas: list[float] = []
    monkeypatch.setattr(state.engine, "update_ema", alphas.append)
    step(state, runs.NUM_STEPS)
    assert alphas[0] == state.method.recipe.model.ema and alphas == sorted(set(alphas))
    assert (cosine_ema(0.9, 0.5), cosine_ema(0.9, 1.0)) == (pytest.approx(0.95), 1.0)


def test_prototypes_keep_their_directions_while_they_are_frozen_and_then_move(tmp_path):
    state = state_of(tmp_path, name="swav", frozen_epochs=0.5)  # an epoch has four steps
    assert isinstance(state.method, Swav)
    directions = [state.method.centroids()]
    for _ in range(3):
        step(state)
        directions.append(state.method.centroids())
    torch.testing.assert_close(directions[2], directions[0], rtol=0, atol=1e-15)
    assert (directions[3] - directions[2]).abs().max() > 1e-6


def test_the_queue_holds_both_views_of_the_last_steps_and_is_scored_by_todays_prototypes(tmp_path):
    state = state_of(
        tmp_path, name="swav", queue_steps=2, queue_after_epochs=9.0, frozen_epochs=0.0
    )
    method = state.method
    assert isinstance(method, Swav) and method.queued_scores() == []
    views: list[Tensor] = []
    real = state.engine.forward_online

    def forward(*inputs: object) -> tuple[Tensor, Tensor]:
        z, p = real(*inputs)  # pyright: ignore
        views.append(p[:2, :, runs.NUM_GROUPS :].detach())
        return z, p

    state.engine.forward_online = forward
    step(state, 3)
    (scores,) = method.queued_scores()
    prototypes = F.normalize(state.engine.online.get_parameter(PROTOTYPES))
    expected = torch.cat([views[2], views[1]], dim=1) @ prototypes.T  # a ring: the third is first
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)  # kept in float32


def test_the_queue_changes_the_codes_once_its_epochs_have_come(tmp_path):
    weights = []
    for epochs in (0.6, 9.0):
        state = state_of(tmp_path, name="swav", queue_steps=2, queue_after_epochs=epochs)
        step(state, 4)
        weights.append(state.engine.online.get_parameter("backbone.gate.weight").clone())
    assert not torch.equal(*weights)
