"""A run whose images and checkpoints are in a store is the run on a disk."""

import json
import shutil

import pytest
from s3_store import BUCKET, copy_to
from small_recipe import small_recipe

from scale_smog import UserError
from scale_smog.preflight.dry_run import dry_run
from scale_smog.pretrain import pretrain
from scale_smog.throughput import Options, profile


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}


@pytest.mark.usefixtures("s3")
def test_a_lost_machine_costs_no_digit_of_the_losses(tars, tmp_path):
    url = f"s3://{BUCKET}/{tmp_path.name}"
    copy_to(tars, f"{url}/images")
    pretrain(small_recipe(tmp_path / "disk", tars))
    stored = tmp_path / "stored"
    there = [f"run.mirror={url}/run", f"data.cache_dir={tmp_path}/cache"]
    pretrain(small_recipe(stored, f"{url}/images", *there, "run.checkpoint_every=4"))
    assert losses(stored) == losses(tmp_path / "disk")
    shutil.rmtree(stored)
    shutil.rmtree(tmp_path / "cache")
    pretrain(small_recipe(stored, f"{url}/images", *there))  # the last copy is of its end
    assert (stored / "run" / "checkpoints" / "step-00000008").is_dir()


@pytest.mark.usefixtures("s3")
def test_what_comes_back_goes_on_under_its_own_recipe_and_dataset_only(tars, tmp_path):
    there = f"run.mirror=s3://{BUCKET}/{tmp_path.name}/run"
    pretrain(small_recipe(tmp_path, tars, there))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run with run\.seed=0, not 1"):
        pretrain(small_recipe(tmp_path, tars, there, "run.seed=1"))
    shutil.rmtree(tmp_path / "run")
    pretrain(small_recipe(tmp_path, tars, there))  # its own: there is nothing left to train
    assert not losses(tmp_path)


def profile_loader(recipe):
    profile(recipe, Options(num_steps=1, num_warm_up=0, loader_only=True))


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("program", [dry_run, profile_loader])
def test_what_programs_read_of_a_store_is_kept_where_the_recipe_says(tars, tmp_path, program):
    copy_to(tars, url := f"s3://{BUCKET}/{tmp_path.name}")
    program(small_recipe(tmp_path, url, f"data.cache_dir={tmp_path}/there"))
    assert list((tmp_path / "there").rglob("manifest.json"))
