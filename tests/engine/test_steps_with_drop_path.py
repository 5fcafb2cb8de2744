"""Drop path is part of the step: the same on any ranks, after a stop, under every engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import engine_runs as runs
import pytest
import torch
from engine_runs import ENGINES
from ranks import run_on_ranks
from small_recipe import small_recipe
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scale_smog import checkpoint
from scale_smog.data.batch import Batch
from scale_smog.loop import train_step
from scale_smog.methods import StepReport
from scale_smog.models.drop_path import DropPath, drop_paths
from scale_smog.models.timm_nets import replace_drop_paths
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues
from scale_smog.state import build_state

RATE, STOP_AT = 0.5, 5
IN_FLOAT64, FEW_STEPS = ("ddp", "fsdp", "hsdp"), 2
THAT_SPLIT = ("zero2", "zero3", "fsdp")  # shifted windows and merged patches too
Exact = dict[str, runs.States]


def tiny_vit(rate: float) -> nn.Module:
    """For views of 12 and 8 px."""
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return VisionTransformer(**sizes, dynamic_img_size=True, num_classes=0, drop_path_rate=rate)


def tiny_swin(rate: float) -> nn.Module:
    """Of two stages, the first with a block of shifted windows."""
    sizes = {"img_size": 12, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "window_size": 3}
    return SwinTransformer(
        **sizes, num_heads=(2, 2), strict_img_size=False, num_classes=0, drop_path_rate=rate
    )


NETS = {"vit": tiny_vit, "swin": tiny_swin}


def with_ours(net: str, rate: float) -> nn.Module:
    backbone = NETS[net](rate)
    replace_drop_paths(backbone)
    return backbone


@contextmanager
def backbone(net: str, rate: float = RATE) -> Iterator[None]:
    with mock.patch.object(runs, "SmoothBackbone", partial(with_ours, net, rate)):
        yield


def train(
    folder: Path, net: str, stop_at: int | None = None, rate: float = RATE, **engine: Any
) -> None:
    """A run, or the rest of one that was stopped; hsdp has nodes of a rank."""
    recipe = runs.recipe_of(folder, **{"precision": "fp64", **engine})
    with backbone(net, rate):
        state = runs.build_state(recipe, 1 if engine.get("kind") == "hsdp" else None)
    values = checkpoint.Checkpoints(recipe.run, {}).load_newest(state.state_dict())
    if values is not None:
        assert values.step == STOP_AT
        state.load_state_dict(values.values, values.step)
    train_step = state.method.train_step

    def step_or_stop(batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        if step == stop_at:
            raise phases.StopRequested
        return train_step(batch, scheduled, step)

    state.method.train_step = step_or_stop
    runs.run(recipe, state)


def train_both(folder: Path) -> None:
    for net in NETS:
        train(folder / net, net)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """Runs in float64 on one rank, and one without drop path."""
    folder = tmp_path_factory.mktemp("exact")
    train_both(folder)
    train(folder / "without", "vit", rate=0.0)
    return {name: runs.final_state(folder / name) for name in (*NETS, "without")}


def worst(folder: Path, expected: runs.States) -> float:
    return max(runs.difference(runs.final_state(folder), expected).values())


def test_drop_path_changes_what_is_trained(exact: Exact) -> None:
    """Else agreement would say nothing."""
    assert runs.difference(exact["vit"], exact["without"])["online"] > 1e-3


def test_three_ranks_in_float64_equal_one(tmp_path: Path, exact: Exact) -> None:
    run_on_ranks(3, train_both, tmp_path)
    for net in NETS:
        assert worst(tmp_path / net, exact[net]) <= 1e-10


def test_a_run_that_is_stopped_goes_on_to_the_bit_and_on_two_ranks_too(
    tmp_path: Path, exact: Exact
) -> None:
    for folder in ("one", "two"):
        train(tmp_path / folder, "vit", STOP_AT)
    train(tmp_path / "one", "vit")
    found = runs.final_state(tmp_path / "one")
    assert not [name for name, x in exact["vit"].items() if not torch.equal(x, found[name])]
    run_on_ranks(2, train, tmp_path / "two", "vit")
    assert worst(tmp_path / "two", exact["vit"]) <= 1e-10


@pytest.mark.parametrize("net", NETS)
def test_activations_that_are_computed_again_are_dropped_alike(
    tmp_path: Path, exact: Exact, net: str
) -> None:
    train(tmp_path, net, activation_checkpointing=True)
    assert worst(tmp_path, exact[net]) <= 1e-12


def test_micro_batches_drop_what_the_whole_batch_drops(tmp_path: Path) -> None:
    for accumulate in (1, 3):
        recipe = runs.recipe_of(tmp_path / str(accumulate), precision="fp64", accumulate=accumulate)
        with backbone("vit"):
            state = runs.build_state(recipe)
        for module in [*state.engine.online.modules(), *state.engine.momentum.modules()]:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # else it would see a micro-batch
        runs.run(recipe, state)
    assert worst(tmp_path / "3", runs.final_state(tmp_path / "1")) <= 1e-10


def train_on_engines(folder: Path) -> None:
    for kind in IN_FLOAT64:
        train(folder / "fp64" / kind, "vit", kind=kind)
    for kind in ENGINES:
        train(folder / kind, "vit", FEW_STEPS, kind=kind, precision="fp32")
    train(folder / "checkpointed", "vit", FEW_STEPS, kind="zero3", precision="fp32",
          activation_checkpointing=True)  # fmt: skip
    for kind in THAT_SPLIT:
        train(folder / "swin" / kind, "swin", FEW_STEPS, kind=kind, precision="fp32")


def test_all_engines_drop_alike(tmp_path: Path, exact: Exact) -> None:
    """In float32 a few steps: soon rounding alone puts an image into another group."""
    run_on_ranks(2, train_on_engines, tmp_path)
    assert max(worst(tmp_path / "fp64" / kind, exact["vit"]) for kind in IN_FLOAT64) <= 1e-10
    for net, folder, runs_of_net in (
        ("vit", tmp_path, (*ENGINES, "checkpointed")),
        ("swin", tmp_path / "swin", THAT_SPLIT),
    ):
        train(folder / "few", net, FEW_STEPS)
        few = runs.final_state(folder / "few")
        found = {name: worst(folder / name, few) for name in runs_of_net}
        assert max(found.values()) <= 1e-5, (net, found)


def test_only_what_is_trained_is_dropped_and_by_the_runs_seed(tmp_path: Path) -> None:
    seen: list[torch.Tensor | None] = []
    first_draws = []
    for seed in (0, 1):
        recipe = small_recipe(
            tmp_path,
            "",
            *("model.backbone=test_vit", "model.drop_path=0.5", f"run.seed={seed}"),
            *("data.large_px=32", "evaluation.image_px=32", "grouping.init=random"),
        )
        state = build_state(recipe, 12, torch.device("cpu"), num_images=100)
        engine = state.engine

        def note(path: DropPath, _: Any) -> None:
            seen.append(path.factors)

        for net in (engine.online, engine.momentum):
            assert len(drop_paths(net)) > 2
            for path in drop_paths(net):
                path.register_forward_pre_hook(note)
        view = torch.randn(12, 3, 32, 32)
        engine.embed(view)
        engine.embed(view, of="momentum")
        engine.project(view)
        engine.forward_momentum(view)
        with torch.no_grad():  # as the start reads features
            engine.forward_online(view, [])
        assert len(seen) > 10 and all(x is None for x in seen)
        seen.clear()
        batch = Batch([view, view], [], torch.full((12,), -1), torch.arange(12))
        train_step(state, batch, ScheduledValues(0.0, 0.0, 1e-3, 0.05, 0.99))
        trained = [x for x in seen if x is not None]
        assert len(trained) == len(drop_paths(engine.online)) == len(seen) / 2  # not the momentum's
        first_draws.append(torch.stack(trained))
        seen.clear()
    assert not torch.equal(*first_draws)
