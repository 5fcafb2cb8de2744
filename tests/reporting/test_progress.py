"""What a rank reports of its steps: quality without labels, and the end of a run that stays low."""

import json
import math
from pathlib import Path

import pytest
from small_recipe import small_recipe

from scale_smog.checkpoint.manifest import list_checkpoints
from scale_smog.errors import UserError
from scale_smog.pretrain import pretrain
from scale_smog.reporting.health import StopBelow
from scale_smog.reporting.metrics import Metrics
from scale_smog.reporting.starts import has_ended


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_features_are_judged_without_labels_at_every_logged_step(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars)
    pretrain(recipe)
    for line in logged(tmp_path / "run"):
        assert 1 <= line["rankme_features"] <= 12 + 1e-3  # images of a step
        assert 1 <= line["rankme_bank"] <= 16 + 1e-3  # dimensions
        assert -4.1 <= line["uniformity"] <= 0 <= line["alignment"] <= 4


def test_a_method_without_a_bank_has_its_features_judged(tmp_path, tars):
    pretrain(small_recipe(tmp_path, tars, "method.name=simclr", "run.steps=2"))
    line = logged(tmp_path / "run")[-1]
    assert "rankme_features" in line and "rankme_bank" not in line


def test_a_run_whose_figure_stays_low_ends_and_its_newest_checkpoint_stands(tmp_path, tars):
    stop_below = ["run.stop_below={rankme_bank: 1000}", "run.stop_patience=3"]
    recipe = small_recipe(tmp_path, tars, "run.checkpoint_every=2", *stop_below)
    with pytest.raises(UserError, match=r"rankme_bank has been below 1000 for 3 values .* step 3"):
        pretrain(recipe)
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3]
    assert has_ended(tmp_path / "run")  # a follower waits for nothing more
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_figure_that_recovers_begins_its_patience_anew():
    stop_below = StopBelow({"knn": 0.5}, patience=2)
    for step, knn in enumerate((0.4, 0.6, 0.4)):
        stop_below.note({"step": step, "knn": knn})
        stop_below.note({"step": step, "loss": 1.0})  # without kNN: no value
    assert not stop_below.problem
    stop_below.note({"step": 3, "knn": 0.3})
    assert stop_below.problem.startswith("run.stop_below: knn has been below 0.5 for 2 values")


def test_a_figure_that_is_not_a_number_is_below_every_floor():
    stop_below = StopBelow({"rankme_features": 2}, patience=1)
    stop_below.note({"step": 1, "rankme_features": math.nan})
    assert "rankme_features has been below 2" in stop_below.problem


def test_only_figures_that_are_logged_can_be_a_floor(tmp_path):
    with pytest.raises(UserError, match=r"run\.stop_below"):
        small_recipe(tmp_path, "nowhere", "run.stop_below={knnn: 1}")


def test_logged_lines_are_json_whatever_the_figures_are(tmp_path):
    metrics = Metrics(tmp_path, 0, 9, 4)
    line = {"step": 1, "loss": 1.0, "chance_loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0}
    metrics.log(line | {"uniformity": math.nan, "rankme_bank": -math.inf})
    metrics.close()
    assert logged(tmp_path) == [line] and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
