"""Every evaluation on two ranks finds what it finds on one."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from dense_sets import write_voc
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.checkpoint.nets import find_checkpoint, read_part
from scale_smog.evaluation.program import PROGRAMS

FINETUNE = ["finetune.share=0.5", "finetune.epochs=2", "finetune.batch=8"]


def on_a_rank(name: str, run: str, overrides: list[str]) -> None:
    """The whole command, on ranks that exist already."""
    cpu = torch.device("cpu")
    with mock.patch.object(distributed, "process_group", lambda: nullcontext(cpu)):
        PROGRAMS[name]([run], overrides, False)


def on_one_and_two(name: str, run_dir: Path, folder: Path, overrides: list[str]) -> list[Path]:
    """Run folders after the command on one rank and on two."""
    runs = [shutil.copytree(run_dir, folder / f"on-{ranks}" / "run") for ranks in (1, 2)]
    PROGRAMS[name]([str(runs[0])], overrides, False)
    run_on_ranks(2, on_a_rank, name, str(runs[1]), overrides)
    return runs


def figures(run: Path, name: str) -> dict[str, float]:
    found = json.loads((run / "results.json").read_text())[name]
    return {key: value for key, value in found.items() if isinstance(value, float)}


@pytest.mark.parametrize("name", ["knn", "groups"])
def test_what_is_only_measured_is_the_same(run_dir, tmp_path, name):
    one, two = on_one_and_two(name, run_dir, tmp_path, ["evaluation.baselines=true"])
    assert len(figures(one, name)) > 2
    assert figures(two, name) == pytest.approx(figures(one, name), abs=1e-6)


def test_features_are_the_same_and_in_the_same_order(run_dir, tmp_path):
    one, two = on_one_and_two("features", run_dir, tmp_path, ["features.projector=8"])
    for name in ("train-features", "train-labels", "test-features"):
        a, b = (np.load(run / "features" / f"{name}.npy") for run in (one, two))
        np.testing.assert_allclose(a, b, atol=1e-5)
    # TensorBoard finds eight pictures of each set, their classes and features.
    boards = list((one / "tensorboard").rglob("metadata.tsv"))
    assert len(boards) == 2
    for board in boards:
        assert len(board.read_text().splitlines()) == 8
        assert (board.parent / "sprite.png").stat().st_size > 0


def test_a_fine_tuned_net_is_the_same_but_for_rounding(run_dir, tmp_path):
    one, two = on_one_and_two("finetune", run_dir, tmp_path, FINETUNE)
    nets = [
        torch.load(next(run.glob("*/finetune-*/trained-progress.pt")), weights_only=True)["net"]
        for run in (one, two)
    ]
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, atol=1e-3, rtol=1e-3)
    # The batch norms are trained too: their statistics are no longer those of the pre-training.
    before = read_part(find_checkpoint(run_dir)[0], "online")["backbone.bn1.running_mean"]
    assert not torch.allclose(nets[0]["backbone.bn1.running_mean"], before, rtol=1e-3)
    assert figures(two, "finetune")["top5"] == figures(one, "finetune")["top5"] == 1.0


def test_segmentation_measures_every_image_once(run_dir, tmp_path):
    voc = write_voc(tmp_path / "voc")
    keys = [f"segmentation.path={voc}", "segmentation.steps=2", "segmentation.batch=2"]
    keys += ["segmentation.crop_px=32", "segmentation.rate=1e-9", "segmentation.workers=0"]
    keys += ["segmentation.train_split=train"]
    one, two = on_one_and_two("segmentation", run_dir, tmp_path, keys)
    found = [figures(run, "segmentation") for run in (one, two)]
    assert found[1] == pytest.approx(found[0], abs=1e-2)
