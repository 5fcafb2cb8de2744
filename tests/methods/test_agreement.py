"""Every method trains the same nets on all engines and any number of ranks, and resumes exactly."""

from pathlib import Path
from typing import Any

import engine_runs as runs
import pytest
import torch
from engine_runs import ENGINES
from ranks import run_on_ranks

from scale_smog import checkpoint, distributed
from scale_smog.config import MethodConfig
from scale_smog.data.batch import Batch
from scale_smog.methods import METHODS, Method, StepReport
from scale_smog.methods.swav import PROTOTYPES
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues

# tests/engine compares the default with plain torch.
OTHERS = [name for name in METHODS if name != MethodConfig().name]
STOP_AT = 5  # in the second epoch
# Nothing of their own here: zero2 is zero1's class, and hsdp on nodes of one rank is fsdp's.
# tests/engine compares them with plain torch; swav, which freezes weights, trains under them too.
ALIKE = ("zero2", "hsdp")


def method_of(name: str) -> dict[str, Any]:
    """Its section, with which every part of it is at work in a short run."""
    own = {"queue_steps": 2, "queue_after_epochs": 0.6, "frozen_epochs": 0.3}
    return {"name": name, **(own if name == "swav" else {})}


def train(folder: Path, name: str, **engine: Any) -> None:
    recipe = runs.recipe_of(folder / name, method=method_of(name), **engine)
    # Two nodes of hsdp would be four ranks.
    state = runs.build_state(recipe, 1 if engine.get("kind") == "hsdp" else None)
    runs.run(recipe, state)


def train_all(folder: Path, engine: dict[str, Any]) -> None:
    for name in methods_under(engine.get("kind")):
        train(folder, name, **engine)


def methods_under(engine: str | None) -> list[str]:
    """What is trained under an engine; None: the default."""
    return ["swav"] if engine in ALIKE else OTHERS


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    """The methods in float64 on one rank."""
    folder = tmp_path_factory.mktemp("exact")
    train_all(folder, {"precision": "fp64"})
    return folder


def differences(folder: Path, expected: Path, engine: str | None = None) -> dict[str, float]:
    """The largest of each method that was trained under an engine."""
    return {
        name: max(
            runs.difference(
                runs.final_state(folder / name), runs.final_state(expected / name)
            ).values()
        )
        for name in methods_under(engine)
    }


def test_three_ranks_in_float64_equal_one(tmp_path, exact):
    run_on_ranks(3, train_all, tmp_path, {"precision": "fp64"})
    assert max(differences(tmp_path, exact).values()) <= 1e-10


def train_on_engines(folder: Path, engines: tuple[str, ...]) -> None:
    for engine in engines:
        train_all(folder / engine, {"kind": engine})


def test_all_engines_agree_on_every_method(tmp_path, exact):
    run_on_ranks(2, train_on_engines, tmp_path, ENGINES)
    found = {engine: differences(tmp_path / engine, exact, engine) for engine in ENGINES}
    too_far = {
        (engine, name): x for engine, by in found.items() for name, x in by.items() if x > 1e-6
    }
    assert not too_far, too_far


def test_the_nets_have_moved_and_differ_between_methods(exact):
    """Else agreement would say nothing."""
    key = "backbone.gate.weight"
    weights = {name: runs.final_state(exact / name)[f"online.{key}"] for name in OTHERS}
    first = runs.build_tiny_nets(0)[0].get_parameter(key)
    for name, weight in weights.items():
        assert (weight - first).abs().max() > 1e-4, name
        assert sum(torch.equal(weight, other) for other in weights.values()) == 1


def stop_at(last: int, method: Method) -> None:
    train_step = method.train_step

    def step_or_stop(batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        if step == last:
            raise phases.StopRequested
        return train_step(batch, scheduled, step)

    method.train_step = step_or_stop


def resume(folder: Path, name: str) -> None:
    recipe = runs.recipe_of(folder / name, method=method_of(name), precision="fp64")
    restored = checkpoint.Checkpoints(recipe.run, {})
    state = runs.build_state(recipe)
    values = restored.load_newest(state.state_dict())
    assert values is not None
    state.load_state_dict(values.values, values.step)
    assert state.step == STOP_AT
    runs.run(recipe, state)


def resume_all(folder: Path) -> None:
    for name in OTHERS:
        resume(folder, name)


def test_a_run_that_is_stopped_and_goes_on_on_two_ranks_equals_one_that_is_not(tmp_path, exact):
    for name in OTHERS:
        recipe = runs.recipe_of(tmp_path / name, method=method_of(name), precision="fp64")
        state = runs.build_state(recipe)
        stop_at(STOP_AT, state.method)
        runs.run(recipe, state)
    run_on_ranks(2, resume_all, tmp_path)
    assert max(differences(tmp_path, exact).values()) <= 1e-10


def test_micro_batches_change_nothing_but_the_statistics_of_batch_norm(tmp_path):
    for name in ("swav", "deepcluster_v2"):
        for part, accumulate in (("whole", 1), ("split", 2)):
            recipe = runs.recipe_of(
                tmp_path / part / name, method=method_of(name), precision="fp64",
                accumulate=accumulate,
            )  # fmt: skip
            state = runs.build_state(recipe)
            for module in state.engine.online.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            runs.run(recipe, state)
        split, whole = (runs.final_state(tmp_path / part / name) for part in ("split", "whole"))
        assert max(runs.difference(split, whole).values()) <= 1e-10


def whole_prototypes(folder: Path) -> dict[str, bool]:
    """By engine, whether they are those of its checkpoint."""
    are_whole = {}
    for kind in ("zero1", "zero3", "fsdp"):
        recipe = runs.recipe_of(folder / kind, method=method_of("swav"), kind=kind)
        state = runs.build_state(recipe)
        runs.run(recipe, state, 2)
        saved = runs.final_state(folder / kind)[f"online.{PROTOTYPES}"]
        distributed.barrier()
        are_whole[kind] = torch.equal(state.engine.whole_parameter(PROTOTYPES), saved)
    return are_whole


def test_prototypes_are_whole_on_every_rank_of_engines_that_split_them(tmp_path):
    for are_whole in run_on_ranks(3, whole_prototypes, tmp_path):
        assert are_whole == dict.fromkeys(are_whole, True)
