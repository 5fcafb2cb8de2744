"""Every engine trains the same model: that of one rank on the whole batch, in float64."""

import os
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from small_recipe import write_small_recipe
from torch.nn import functional

from scale_smog import checkpoint, distributed, load_recipe
from scale_smog.data.batch import Batch
from scale_smog.loop import train
from scale_smog.metrics import Metrics
from scale_smog.pretrain import build_state, plan_steps

NUM_STEPS, NUM_IMAGES = 6, 40
GENTLE = {"lars": "optimizer.base_lr=0.2", "adamw": "optimizer.base_lr=2e-4"}


def batches(first: int, global_batch: int):
    """This rank's slice of a global batch that depends on the step alone."""
    size = global_batch // distributed.world_size()
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    for step in range(first, NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        coarse = torch.randn(3 * global_batch, 3, 4, 4, generator=generator, dtype=torch.float64)
        views = functional.interpolate(coarse, size=24, mode="bilinear").chunk(3)
        label = torch.full((size,), -1)
        yield Batch([views[0][mine], views[1][mine]], [views[2][mine]], label, label)


def run(world_size: int, folder: Path, optimizer: str, engine: str, precision: str, **options):
    """What `run_on_rank` returns, of every rank."""
    path = write_small_recipe(folder, "nowhere")
    (folder / "run").mkdir(exist_ok=True)
    overrides = [
        f"run.steps={NUM_STEPS}",
        "run.checkpoint_every=3",
        f"optimizer.name={optimizer}",
        GENTLE[optimizer],
        f"engine.kind={engine}",
        f"engine.precision={precision}",
        "data.num_small_crops=1",
    ]
    return run_on_ranks(world_size, run_on_rank, path, overrides, options.get("resume", False))


def run_on_rank(path: Path, overrides: list[str], resume: bool):
    """Trains on this rank; returns the full state and this rank's own groups."""
    recipe = load_recipe(path, overrides)
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(distributed.world_size())
    # Another seed on every rank: rank 0's weights must win.
    recipe = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"seed": distributed.rank()})}
    )
    global_batch = recipe.data.global_batch
    state = build_state(recipe, global_batch // distributed.world_size(), torch.device("cpu"))
    state.groups.load_state_dict(_groups())
    _, schedules = plan_steps(recipe, NUM_IMAGES)
    if resume:
        tensors, facts = checkpoint.load(Path(recipe.run.dir) / "checkpoints" / "step-00000003")
        state.load_full_state(tensors, facts["step"])
    metrics = Metrics(Path(recipe.run.dir), state.step, NUM_STEPS, global_batch)
    loader = batches(state.step, global_batch)
    train(recipe, state, loader, schedules, metrics, lambda step: None, {})
    metrics.close()
    own = state.groups.centroids.clone()
    return {k: v.clone() for k, v in state.full_state().items()}, own


def _groups():
    generator = torch.Generator().manual_seed(0)
    centroids = functional.normalize(torch.randn(10, 16, generator=generator))
    return {
        "centroids": centroids,
        "num_members": torch.zeros(10),
        "num_commits": torch.tensor(0),
    }


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |a - b| / max(1, max |b|) for each kind of tensor."""
    assert a.keys() == b.keys()
    kinds = {name.split(".")[0] for name in a}
    worst = {}
    for kind in kinds:
        names = [name for name in a if name.split(".")[0] == kind]
        scale = max(1.0, *(b[name].abs().max().item() for name in names))
        worst[kind] = max((a[n].double() - b[n].double()).abs().max().item() for n in names) / scale
    return worst


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_ddp_and_zero1_on_two_ranks_train_what_one_rank_trains_on_the_whole_batch(
    tmp_path, optimizer
):
    """ddp against one rank in float64; zero1, which is float32 only, against ddp in float32."""
    ((one, _),) = run(1, tmp_path / "one", optimizer, "ddp", "fp64")
    start, _ = checkpoint.load(tmp_path / "one" / "run" / "checkpoints" / "step-00000003")
    weights = [name for name in one if name.startswith("online.") and "weight" in name]
    assert max((one[n] - start[n]).norm() / start[n].norm() for n in weights) > 1e-4

    ddp64 = run(2, tmp_path / "ddp64", optimizer, "ddp", "fp64")
    ddp32 = run(2, tmp_path / "ddp32", optimizer, "ddp", "fp32")
    zero1 = run(2, tmp_path / "zero1", optimizer, "zero1", "fp32")
    for first, second in (ddp64, ddp32, zero1):
        assert torch.equal(first[1], second[1]), "groups differ between ranks"
        assert all(torch.equal(first[0][name], second[0][name]) for name in second[0])
    assert max(difference(ddp64[0][0], one).values()) < 1e-12
    assert max(difference(zero1[0][0], ddp32[0][0]).values()) < 1e-6


def test_a_checkpoint_of_one_engine_goes_on_under_another_and_other_ranks(tmp_path):
    """Plain float32 on one rank is 1e-6 away from float64 by itself."""
    ((one, _),) = run(1, tmp_path / "one", "lars", "ddp", "fp64")
    run(2, tmp_path / "two", "lars", "zero1", "fp32")
    for world_size, engine in ((1, "ddp"), (3, "zero1")):
        ranks = run(world_size, tmp_path / "two", "lars", engine, "fp32", resume=True)
        assert max(difference(ranks[0][0], one).values()) < 5e-6


def test_bfloat16_runs_agree_between_the_engines(tmp_path):
    ddp = run(2, tmp_path / "ddp", "lars", "ddp", "bf16")
    zero = run(2, tmp_path / "zero", "lars", "zero1", "bf16")
    assert max(difference(zero[0][0], ddp[0][0]).values()) < 1e-6
