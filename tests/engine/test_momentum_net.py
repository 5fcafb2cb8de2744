"""The momentum net as a product: every engine evaluates it as a plain copy of it would."""

from pathlib import Path

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks


def errors_of_features(kind: str, folder: Path) -> dict[str, float]:
    """Largest difference of each net's features from those of the checkpoint's weights."""
    recipe = runs.recipe_of(folder / kind, kind=kind)
    state = runs.build_state(recipe)
    runs.run(recipe, state, num_steps=3)
    saved, errors = runs.final_state(folder / kind), {}
    (view, _), _ = runs.global_batch(100)
    for name in ("online", "momentum"):
        plain = dict(zip(("online", "momentum"), runs.build_tiny_nets(0), strict=True))[name]
        own = {k.removeprefix(f"{name}."): v for k, v in saved.items() if k.startswith(f"{name}.")}
        plain.load_state_dict(own)
        with torch.no_grad():
            expected = plain.eval().features(view.float())
        found = state.engine.embed(view, of=name)
        errors[name] = (found - expected).abs().max().item()
    errors["between the nets"] = (found - state.engine.embed(view)).abs().max().item()
    return errors


def embedded_after_the_first_step(kind: str, folder: Path) -> None:
    """A run of four steps that evaluates each net once in between."""
    recipe = runs.recipe_of(folder / f"{kind} evaluated", kind=kind)
    state = runs.build_state(recipe)
    runs.run(recipe, state, num_steps=1)
    (view, _), _ = runs.global_batch(100)
    for name in ("momentum", "online"):
        state.engine.embed(view, of=name)
    runs.run(recipe, state, num_steps=8)


def undisturbed(kind: str, folder: Path) -> None:
    recipe = runs.recipe_of(folder / f"{kind} undisturbed", kind=kind)
    runs.run(recipe, runs.build_state(recipe), num_steps=8)


@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
def test_an_evaluation_after_the_first_step_changes_no_training(kind, tmp_path):
    """DeepSpeed learns the order of the layers in that step."""
    run_on_ranks(2, embedded_after_the_first_step, kind, tmp_path)
    run_on_ranks(2, undisturbed, kind, tmp_path)
    evaluated, other = (
        runs.final_state(tmp_path / f"{kind} {name}") for name in ("evaluated", "undisturbed")
    )
    assert max(runs.difference(evaluated, other).values()) < 1e-6


@pytest.mark.parametrize("kind", ["ddp", "zero3", "fsdp"])
def test_features_of_either_net_are_those_of_its_weights(kind, tmp_path):
    for errors in run_on_ranks(2, errors_of_features, kind, tmp_path):
        assert errors["online"] < 1e-5 and errors["momentum"] < 1e-5
        assert errors["between the nets"] > 1e-3  # two nets indeed
