"""Whole runs of every method on tars: start, steps, reports, checkpoints, groups, export."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe

from scale_smog import Recipe, UserError, checkpoint
from scale_smog.evaluation.groups.program import evaluate_groups
from scale_smog.methods import METHODS, deepcluster_v2
from scale_smog.pretrain import pretrain

STEPS = ("run.steps=6", "run.checkpoint_every=3")
CHANCE = {  # 12 images a step, ten groups, a temperature of 0.2
    "smog": math.log(10),
    "swav": math.log(10),
    "deepcluster_v2": math.log(10),
    "simclr": math.log(23),
    "moco_v3": 0.8 * math.log(12),
    "byol": 4.0,
}


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tars) -> Callable[[str], Recipe]:
    """Trains a method, once; the recipe of its run."""

    @cache
    def train(name: str) -> Recipe:
        folder = tmp_path_factory.mktemp(name)
        recipe = small_recipe(folder, tars, *STEPS, f"method.name={name}")
        pretrain(recipe)
        return recipe

    return train


@pytest.mark.parametrize("name", METHODS)
def test_a_run_reports_ends_and_has_a_checkpoint(run_of, name):
    recipe = run_of(name)
    run_dir = Path(recipe.run.dir)
    logged = lines_of(run_dir)
    assert len(logged) == 6
    for line in logged:
        assert line["chance_loss"] == pytest.approx(CHANCE[name])
        assert 0 < line["loss"] < 3 * CHANCE[name]
        assert ("groups_in_use" in line) == recipe.method.has_groups
        assert ("beta" in line) == recipe.method.has_bank
    tensors, _ = checkpoint.load(checkpoint.list_checkpoints(run_dir)[-1])
    has_momentum = any(name.startswith("momentum.") for name in tensors)
    assert has_momentum == (recipe.nets.num_momentum_views > 0)
    results = json.loads((run_dir / "results.json").read_text())
    assert 0 <= results["knn"]["trained"] <= 1
    assert ("groups" in results) == recipe.method.has_groups


@pytest.mark.parametrize("name", ["swav", "deepcluster_v2"])
def test_groups_of_other_methods_are_judged_as_smogs_are(tmp_path, run_of, name):
    run_dir = shutil.copytree(run_of(name).run.dir, tmp_path / "run")
    evaluate_groups([str(run_dir)], ())
    results = json.loads((run_dir / "results.json").read_text())
    assert results["groups"]["num_groups"] == 10
    assert (run_dir / "group_entropy.png").exists()


def test_a_method_without_groups_says_so(run_of):
    with pytest.raises(UserError, match=r"method\.name=byol has no groups"):
        evaluate_groups([run_of("byol").run.dir], ())


def test_deepcluster_begins_with_features_of_all_images_and_clusters_at_every_epoch(
    tmp_path, tars, monkeypatch
):
    found: list[tuple[int, bool]] = []
    clusters = deepcluster_v2.ImageClusters
    real = clusters.find

    def find(self: deepcluster_v2.ImageClusters, iterations: int, draw: int) -> None:
        features = self.state_dict()["features"].values
        found.append((draw, bool(features.norm(dim=1).allclose(torch.ones(len(features))))))
        real(self, iterations, draw)

    monkeypatch.setattr(clusters, "find", find)
    # Forty images, twelve a step: 0, 4 and 7 are the first that begin in an epoch.
    pretrain(small_recipe(tmp_path, tars, "run.steps=8", "method.name=deepcluster_v2"))
    assert found == [(0, True), (4, True), (7, True)]


def test_small_views_of_a_method_that_has_none_are_refused(tmp_path, tars):
    with pytest.raises(UserError, match="byol trains two large views"):
        small_recipe(tmp_path, tars, "method.name=byol", "data.num_small_crops=2")


@pytest.mark.parametrize("keys", [["data.loader=fast"], ["data.loader=stream", "data.stream=x"]])
def test_a_loader_that_does_not_number_images_is_refused_for_clusters_of_images(
    tmp_path, tars, keys
):
    with pytest.raises(UserError, match=f"{keys[0]} does not number them"):
        small_recipe(tmp_path, tars, "method.name=deepcluster_v2", *keys)


def test_more_clusters_than_images_are_refused(tmp_path, tars):
    keys = ("method.name=deepcluster_v2", "grouping.num_groups=41")
    with pytest.raises(UserError, match="num_groups=41 is more than the 40 images"):
        pretrain(small_recipe(tmp_path, tars, *keys))
