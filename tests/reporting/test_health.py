"""A step that is not finite on some rank leaves nothing behind on any; collapse is said."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file

from scale_smog import UserError, distributed
from scale_smog.checkpoint import Checkpoints
from scale_smog.config import Recipe, RunConfig
from scale_smog.data.batch import Batch
from scale_smog.errors import RunEnded
from scale_smog.loop import train, train_step
from scale_smog.reporting.health import SkippedSteps, collapse_warning
from scale_smog.reporting.progress import Progress
from scale_smog.state import TrainState

POISONED = 3  # the step whose batch is not finite on the last rank
ENGINES = ("ddp", "zero1", "zero3", "fsdp")  # zero2 and hsdp share what is at stake with these


def poison(batch: Batch, value: float) -> Batch:
    """One pixel of one image of the last rank."""
    if distributed.rank() == distributed.world_size() - 1:
        batch.large[0][1, 0, 2, 2] = value
    return batch


def values_of(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: partition.values.clone() for name, partition in state.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def skip_a_step(folder: Path, engine: str, value: float, **settings: object) -> dict[str, list]:
    """What a poisoned step changed, and what the run that goes on has other than one without it."""
    recipe = runs.recipe_of(folder / engine, kind=engine, **settings)
    poisoned, clean = runs.build_state(recipe), runs.build_state(recipe)
    schedules, changed = runs.schedules_of(recipe, runs.NUM_STEPS), []
    for step, batch in enumerate(runs.batches(0)):
        now = schedules.at(step)
        if step == POISONED:
            before = values_of(poisoned)
            report = train_step(poisoned, poison(batch, value), now)
            assert not report.is_applied
            changed = differing(before, values_of(poisoned))
            clean.step += 1  # as if there had been no such batch
        else:
            for state in (poisoned, clean):
                assert train_step(state, batch, now).is_applied
    return {"changed": changed, "later": differing(values_of(poisoned), values_of(clean))}


def skip_on_every_engine(folder: Path) -> dict[str, dict[str, list]]:
    results = {engine: skip_a_step(folder, engine, float("nan")) for engine in ENGINES}
    results["inf"] = skip_a_step(folder, "ddp", float("inf"), optimizer="adamw")
    results["accumulate"] = skip_a_step(folder, "ddp", float("nan"), accumulate=2)
    return results


def test_a_batch_that_is_not_finite_on_one_rank_leaves_every_bit_as_it_was(tmp_path):
    nothing = {"changed": [], "later": []}
    for rank in run_on_ranks(2, skip_on_every_engine, tmp_path):
        assert rank == dict.fromkeys([*ENGINES, "inf", "accumulate"], nothing)


def test_a_gradient_that_is_not_finite_leaves_every_bit_as_it_was(tmp_path):
    recipe = runs.recipe_of(tmp_path)
    state, schedules = runs.build_state(recipe), runs.schedules_of(recipe, 3)
    batches = runs.batches(0)
    train_step(state, next(batches), schedules.at(0))
    before, weight = values_of(state), state.engine.online.backbone.gate.weight
    handle = weight.register_hook(lambda grad: grad * float("inf"))
    report = train_step(state, next(batches), schedules.at(1))
    assert report.loss.isfinite() and not report.is_applied
    assert not differing(before, values_of(state))
    handle.remove()
    assert train_step(state, next(batches), schedules.at(2)).is_applied


def train_on_poison(recipe: Recipe) -> tuple[str, list[str]]:
    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(runs.batches(0)):
            yield poison(batch, float("nan")) if step != 2 else batch

    said: list[str] = []
    metrics = runs.Silence()
    metrics.say = said.append
    state, schedules = runs.build_state(recipe), runs.schedules_of(recipe, runs.NUM_STEPS)
    checkpoints = Checkpoints(recipe.run, {})
    try:
        progress = Progress(recipe, metrics, runs.NUM_STEPS, state.engine.device)
        train(recipe.run, state, batches(), schedules, progress, checkpoints, lambda step: None)
    except UserError as error:
        return str(error), said
    return "", said


def test_after_too_many_steps_in_a_row_the_run_ends_and_names_rank_and_samples(tmp_path):
    recipe = runs.recipe_of(tmp_path)
    run = recipe.run.model_copy(update={"max_skipped": 3})
    recipe = recipe.model_copy(update={"run": run})
    for error, said in run_on_ranks(2, train_on_poison, recipe):
        assert "3 steps in a row were not finite, the last one 6" in error  # step 3 was good
        assert "(rank 1: images of samples" in error
        assert [line.split(" left out")[0] for line in said] == [
            f"warning: step {step}" for step in (1, 2, 4, 5, 6)
        ]
    folder = tmp_path / "not_finite" / "step-00000006"
    assert not load_file(folder / "rank-1.safetensors")["large_0"].isfinite().all()
    assert load_file(folder / "rank-0.safetensors")["large_0"].isfinite().all()
    assert json.loads((folder / "rank-1.json").read_text())["step"] == 6


def test_a_collapse_is_named_with_its_remedy_and_health_is_not():
    collapsed = torch.zeros(100, dtype=torch.int64)
    collapsed[:3] = 1000
    assert "grouping.kmeans" in (collapse_warning(collapsed) or "")
    assert collapse_warning(torch.full((100,), 30)) is None
    assert collapse_warning(collapsed // 100) is None  # too few features for a verdict


def test_a_small_batchs_window_is_enough_to_name_a_collapse():
    num_groups, num_features = 3000, 40 * 64
    draws = torch.randint(num_groups, (num_features,), generator=torch.Generator().manual_seed(0))
    even = torch.bincount(draws, minlength=num_groups)
    assert collapse_warning(even) is None
    few = torch.bincount(draws % 100, minlength=num_groups)
    assert "perplexity 9" in (collapse_warning(few) or "")


def test_batches_that_cannot_be_written_do_not_hide_why_the_run_ends(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("scale_smog.reporting.health.save_file", full)
    run = RunConfig(dir=str(tmp_path), steps=9, max_skipped=1)
    batch = next(runs.batches(0))
    with pytest.raises(RunEnded, match=r"finite, the last one 3 .*cannot be written: I/O"):
        SkippedSteps(run).note(3, False, torch.tensor(math.nan), batch, print)
