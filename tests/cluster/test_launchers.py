"""The same recipe under every launcher, over two hosts and on one: the same run."""

import json
import os
from pathlib import Path

import pytest
import torch
from hosts import Cluster, console, finish
from pictures import draw_none
from programs import OVERRIDES, PRETRAIN, RECIPE, STEPS
from ranks import run_on_ranks

from scale_smog import checkpoint, distributed, load_recipe
from scale_smog.pretrain import run
from scale_smog.runtime.rank_logs import RankLogs
from scale_smog.runtime.watchdog import Watchdog


def train_here(overrides: list[str]) -> None:
    """The whole of a run on ranks that exist already, each with one thread, as on the hosts."""
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    draw_none()
    recipe = load_recipe(RECIPE, overrides)
    with Watchdog(recipe.deadlines):
        run(recipe, torch.device("cpu"), RankLogs())


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.list_checkpoints(run_dir)[-1])[0]


@pytest.mark.parametrize(("launcher", "engine"), [("deepspeed", "zero1"), ("torchrun", "ddp")])
def test_two_hosts_train_as_one(cluster: Cluster, demo: Path, tmp_path: Path, launcher, engine):
    overrides = [*OVERRIDES, f"data.path={demo}", f"engine.kind={engine}"]
    there, here = tmp_path / "there", tmp_path / "here"
    program = [PRETRAIN, RECIPE, *overrides, f"run.dir={there}"]
    start = cluster.deepspeed if launcher == "deepspeed" else cluster.torchrun
    started = start(tmp_path, *program)
    jobs = started if isinstance(started, list) else [started]
    assert finish(jobs, tmp_path) == 0, console(tmp_path).read_text()[-3000:]
    run_on_ranks(2, train_here, [*overrides, f"run.dir={here}"])

    a, b = losses(there), losses(here)
    assert len(a) == STEPS and max(a) - min(a) > 0.1
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-6
    states = final_state(there), final_state(here)
    # Two k-means have passed, at steps 4 and 8.
    names = [name for name in states[0] if name.startswith(("groups.", "bank."))]
    assert names and all(torch.equal(states[0][name], states[1][name]) for name in names)
