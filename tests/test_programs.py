"""The command line: what a user sees."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ports import free_port
from ranks import run_on_ranks
from small_recipe import write_small_recipe

from scale_smog import distributed, load_recipe
from scale_smog.errors import UserError
from scale_smog.pretrain import run
from scale_smog.runtime.rank_logs import RankLogs

ROOT = Path(__file__).parent.parent


def run_program(name: str, *arguments: str, monkeypatch) -> int:
    """Runs launcher/NAME as a program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(ROOT / "launcher" / name), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["data.path=empty"], "no images in empty"),
        (["data.path="], "data.path is empty"),
        (["grouping.num_groops=3"], "did you mean 'grouping.num_groups'"),
        (["data.device=gpu"], "data.device=gpu"),
        (["model.backbone=resnet51"], "resnet51"),
        (["grouping.num_groups=37"], "37"),
        (["run.dir=/proc/nowhere"], "run.dir"),
        (["engine.kind=zero1", "engine.precision=fp64"], "fp64"),
    ],
)
def test_bad_input_gets_one_line_exit_code_2_and_leaves_nothing(
    tmp_path, tars, monkeypatch, capsys, overrides, words
):
    if "data.device=gpu" in overrides:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = str(write_small_recipe(tmp_path, tars))
    assert run_program("pretrain.py", recipe, *overrides, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "run").exists()


def test_a_real_process_exits_with_2_and_without_a_traceback(tmp_path):
    program = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), "nowhere.yaml"]
    ended = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: cannot read recipe nowhere.yaml")
    assert "Traceback" not in ended.stderr


def test_a_hostfile_that_is_not_there_starts_nothing(monkeypatch, capsys):
    arguments = ["--hostfile", "nowhere", "launcher/pretrain.py", "recipes/demo.yaml"]
    assert run_program("on_hosts.py", *arguments, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: no hostfile nowhere")


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path, tars, monkeypatch, capsys):
    recipe = str(write_small_recipe(tmp_path, tars))
    arguments = ["--dry-run", "run.epochs=3", "--local_rank=0"]
    assert run_program("pretrain.py", recipe, *arguments, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    for words in ("num_groups: 10", "10 (3.00 epochs)", "memory of a rank", "backbone parameters"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_first_weights_that_do_not_fit(tmp_path, tars, monkeypatch, capsys):
    recipe = str(write_small_recipe(tmp_path, tars))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    arguments = ["--dry-run", f"model.weights={tmp_path / 'weights.pth'}"]
    assert run_program("pretrain.py", recipe, *arguments, monkeypatch=monkeypatch) == 2
    assert "weights.pth is another net than model.backbone" in capsys.readouterr().err


def test_a_run_leaves_everything_a_user_looks_for(tmp_path, tars, pictures, monkeypatch, capsys):
    recipe = str(write_small_recipe(tmp_path, tars))
    arguments = ["evaluation.baselines=true", "run.evaluate_every=4", "run.checkpoint_every=4"]
    assert run_program("pretrain.py", recipe, *arguments, monkeypatch=monkeypatch) == 0
    run_dir, out = tmp_path / "run", capsys.readouterr().out
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results["knn"]) >= {"raw_pixels", "random", "trained", "k", "temperature"}
    assert results["groups"]["num_groups"] == 10 and 1 <= results["groups"]["perplexity"] <= 10
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = "step epoch loss chance_loss lr beta images_per_s data_wait groups_in_use"
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(expected.split()) | {"group_perplexity"} <= set(lines[0])
    assert lines[0]["chance_loss"] == pytest.approx(2.302585)
    assert (run_dir / "groups.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").iterdir())
    for words in ("raw pixels", "random net", "trained net", "groups.png", "step-00000008"):
        assert words in out

    before = results["knn"]["trained"]
    arguments = ["knn", str(run_dir), "evaluation.k=5"]
    assert run_program("evaluate.py", *arguments, monkeypatch=monkeypatch) == 0
    assert f"{before:.4f}" in capsys.readouterr().out
    assert json.loads((run_dir / "results.json").read_text())["knn"]["trained"] == before

    features = np.random.default_rng(0).standard_normal((60, 8))
    np.savez(tmp_path / "other.npz", features=features, labels=np.arange(60) % 4)
    both = ["groups", str(run_dir), str(tmp_path / "other.npz")]
    assert run_program("evaluate.py", *both, monkeypatch=monkeypatch) == 0
    assert (run_dir / "group_entropy.png").stat().st_size > 10_000
    groups = json.loads((run_dir / "results.json").read_text())["groups"]
    assert groups["num_groups"] == 10 and 0 < groups["entropy_weighted"] <= math.log(4)


def test_a_collective_waits_longer_than_any_deadline(tmp_path, tars, monkeypatch):
    waits = []

    def refuse(timeout: timedelta, **_: Any) -> None:
        waits.append(timeout.total_seconds())
        raise UserError("enough")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    recipe = str(write_small_recipe(tmp_path, tars))
    arguments = [recipe, "deadlines.start_s=7200"]
    assert run_program("pretrain.py", *arguments, monkeypatch=monkeypatch) == 2
    assert waits[0] > 7200


def test_evaluating_what_is_no_checkpoint_is_one_clear_line(tmp_path, monkeypatch, capsys):
    assert run_program("evaluate.py", "knn", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("loader", ["dali", "fast", "stream"])
def test_every_loader_trains_a_whole_run(tmp_path, tars, monkeypatch, loader):
    recipe = str(write_small_recipe(tmp_path, tars))
    overrides = [f"data.loader={loader}", "run.steps=4"]
    if loader == "stream":
        pattern = f"data.stream=pipe:cat {tars}/train-{{000000..000002}}.tar"
        overrides += [pattern, "data.allow_pipe=true"]
    else:
        pytest.importorskip("nvidia.dali")
    assert run_program("pretrain.py", recipe, *overrides, monkeypatch=monkeypatch) == 0
    steps = losses(tmp_path / "run")
    assert len(steps) == 4 and all(map(math.isfinite, steps))


def test_an_unlabelled_set_trains_and_says_that_it_cannot_be_judged(tmp_path, monkeypatch, capsys):
    from images import jpeg

    from scale_smog.data.prepare.shard import shard_folder

    source = tmp_path / "flat"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.jpg").write_bytes(jpeg(30, 30, i))
    shard_folder(source, tmp_path / "tars", workers=1)
    recipe = str(write_small_recipe(tmp_path, tmp_path / "tars"))
    assert run_program("pretrain.py", recipe, "run.steps=2", monkeypatch=monkeypatch) == 0
    assert "no kNN" in capsys.readouterr().out


def test_a_test_split_that_is_damaged_is_no_dataset_without_one(
    tmp_path, tars, monkeypatch, capsys
):
    data = shutil.copytree(tars, tmp_path / "tars")
    next(data.glob("test-*.tar")).unlink()
    recipe = str(write_small_recipe(tmp_path, data))
    assert run_program("pretrain.py", recipe, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert "no kNN" not in said.out and "test-000000.tar" in said.err
    assert not (tmp_path / "run").exists()


def launch(*command: str) -> None:
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train_here(recipe: str, overrides: list[str]) -> None:
    """The whole of a run on ranks that exist already."""
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    run(load_recipe(recipe, overrides), torch.device("cpu"), RankLogs())


@pytest.mark.launcher
def test_losses_agree_over_launchers_ranks_and_engines(tmp_path, tars, monkeypatch):
    """At the recipe's own rate. In fp32 rounding alone soon flips groups, so fp64 is the proof."""
    pretrain = str(ROOT / "launcher" / "pretrain.py")
    torchrun = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", pretrain]
    recipes = {x: str(write_small_recipe(tmp_path / x, tars)) for x in ("one", "two", "zero")}

    fp64 = ["run.steps=20", "engine.precision=fp64"]
    assert run_program("pretrain.py", recipes["one"], *fp64, monkeypatch=monkeypatch) == 0
    launch(*torchrun, recipes["two"], *fp64)
    run_on_ranks(2, train_here, recipes["zero"], ["run.steps=3", "engine.kind=zero1"])
    one, two, zero = (losses(tmp_path / name / "run") for name in recipes)
    assert len(one) == 20 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-8
    assert abs(one[0] - zero[0]) < 1e-5
    assert max(abs(a - b) for a, b in zip(one[:3], zero, strict=True)) < 1e-2
    assert max(zero) - min(zero) > 1e-2  # they agree on something that moves
