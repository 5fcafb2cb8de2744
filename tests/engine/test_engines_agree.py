"""Every engine trains the same model: that of one rank on the whole batch, in float64."""

import math
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import engine_runs as runs
import pytest
import torch
from engine_runs import ENGINES
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.checkpoint import Checkpoints
from scale_smog.engine import Engine
from scale_smog.optim import Lars
from scale_smog.state import TrainState

OPTIMIZERS = ("lars", "adamw")
FEW_STEPS = 5  # of the other precisions, a reset among them
FAULTY_STEPS = 3  # of what is to differ
SAVED_STEP, LAST_STEP = 4, 6  # of the runs that go on elsewhere; the groups are reset in between
NEIGHBOURS = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
Ratios = dict[str, list[tuple[float, int, int]]]  # of a parameter: ratio, start and size of a part


def ranks_of(engine: str) -> int:
    """Two; four for hsdp, whose two nodes have two each."""
    return 4 if engine == "hsdp" else 2


def ranks_per_node(engine: str) -> int | None:
    """Half of the ranks for hsdp, where they are even."""
    size = distributed.world_size()
    return size // 2 if engine == "hsdp" and size % 2 == 0 else None


def train(folder: Path, num_steps: int = runs.NUM_STEPS, **settings: Any) -> None:
    """A run on this rank, whose end is a checkpoint in `folder`."""
    recipe = runs.recipe_of(folder, **settings)
    state = runs.build_state(recipe, ranks_per_node(recipe.engine.kind))
    runs.run(recipe, state, num_steps)
    nets = [*state.engine.online.named_buffers(), *state.method.groups.named_buffers()]
    assert runs.same_on_all_ranks(dict(nets))


def step_with_one_ratio(lars: Lars, closure: Any = None, norms: Any = None) -> None:
    """LARS as a flat optimizer sees it: one layer."""
    w, g = (math.hypot(*each) for each in zip(*norms.values(), strict=True))
    REAL_STEP(lars, norms=dict.fromkeys(norms, (w, g)))


FAULTY_ENGINES = ("zero1", "fsdp")  # flat slices, and rows
REAL_STEP, REAL_RATIO = Lars.step, Lars._trust_ratio
FAULTS: dict[str, Any] = {
    "one global ratio": lambda: mock.patch.object(Lars, "step", step_with_one_ratio),
    "no momentum update": lambda: mock.patch.object(
        Engine, "update_ema", lambda engine, alpha: None
    ),
}


def build(folder: Path, engine: str) -> TrainState:
    return runs.build_state(runs.recipe_of(folder, kind=engine), ranks_per_node(engine))


def first_ratios(folder: Path, engine: str, state: TrainState) -> Ratios:
    """Of this rank's parts of the parameters in a new state's first step; 1 if not adapted."""
    found: list[float] = []

    def record(*arguments: Any) -> float:
        found.append(REAL_RATIO(*arguments))
        return found[-1]

    with mock.patch.object(Lars, "_trust_ratio", record):
        runs.run(runs.recipe_of(folder / "ratios", kind=engine), state, num_steps=1)
    ratios: Ratios = {name: [] for name in dict(state.engine.online.named_parameters())}
    of_adapted = iter(found)
    for part in state.engine.partitions:
        ratio = 1.0 if part.is_excluded else next(of_adapted)
        ratios[part.name].append((ratio, part.start, part.value.numel()))
    return ratios


def save_and_go_on(folder: Path, engine: str) -> None:
    """A checkpoint in the middle, and the end of the same, uninterrupted run."""
    recipe = runs.recipe_of(folder / f"{engine} saved", kind=engine)
    state = runs.build_state(recipe, ranks_per_node(engine))
    runs.run(recipe, state, SAVED_STEP)
    runs.run(runs.recipe_of(folder / f"{engine} whole", kind=engine), state, LAST_STEP)


def load_and_go_on(folder: Path, engine: str, saved: str, state: TrainState) -> None:
    """From a checkpoint to the end, in a state of `engine`."""
    saved_run = runs.recipe_of(folder / f"{saved} saved").run
    restored = Checkpoints(saved_run, {}).load_newest(state.state_dict())
    assert restored and restored.step == SAVED_STEP
    state.load_state_dict(restored.values, restored.step)
    own = folder / f"{saved} to {engine} on {distributed.world_size()}"
    runs.run(runs.recipe_of(own, kind=engine), state, LAST_STEP)


def load_each_under_another(folder: Path) -> dict[str, Ratios]:
    """Into states that have done a first step, whose trust ratios are returned."""
    ratios = {}
    for saved, engine in NEIGHBOURS.items():
        state = build(folder, engine)
        ratios[engine] = first_ratios(folder, engine, state)
        load_and_go_on(folder, engine, saved, state)
    return ratios


def on_two_ranks(folder: Path) -> dict[str, Ratios]:
    engines = [engine for engine in ENGINES if ranks_of(engine) == 2]
    for engine in engines:
        for optimizer in OPTIMIZERS:
            train_named(folder, engine, optimizer, "fp32")
        train_named(folder, engine, "lars", "bf16")
        save_and_go_on(folder, engine)
    for saved, engine in NEIGHBOURS.items():
        state = build(folder, engine)
        for name in (engine, saved):  # its own into fresh nets
            load_and_go_on(folder, engine, name, state)
    for engine in ("ddp", "fsdp"):
        train_named(folder, engine, "lars", "fp64")
    for engine in FAULTY_ENGINES:
        for name, fault in FAULTS.items():
            with fault():
                train(folder / f"{engine} {name}", FAULTY_STEPS, kind=engine)
        own = folder / f"{engine} batch norm of a rank"
        train(own, FAULTY_STEPS, kind=engine, batch_norm="local")
    return {engine: first_ratios(folder, engine, build(folder, engine)) for engine in ENGINES}


def on_four_ranks(folder: Path) -> dict[str, Ratios]:
    for optimizer in OPTIMIZERS:
        train_named(folder, "hsdp", optimizer, "fp32")
    for engine in ("ddp", "hsdp"):
        train_named(folder, engine, "lars", "bf16")
    train_named(folder, "hsdp", "lars", "fp64")
    save_and_go_on(folder, "hsdp")
    load_and_go_on(folder, "hsdp", "hsdp", build(folder, "hsdp"))
    return {"hsdp": first_ratios(folder, "hsdp", build(folder, "hsdp"))}


def train_named(folder: Path, engine: str, optimizer: str, precision: str) -> None:
    name = f"{engine} {optimizer} {precision} on {distributed.world_size()}"
    num_steps = runs.NUM_STEPS if precision == "fp32" else FEW_STEPS
    train(folder / name, num_steps, kind=engine, optimizer=optimizer, precision=precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this file are; each number of ranks is started once."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ratios(folder: Path) -> dict[int, list[dict[str, Ratios]]]:
    """Trust ratios by number of ranks and rank; the runs are made on the way."""
    programs = {4: on_four_ranks, 2: on_two_ranks}
    programs |= dict.fromkeys((3, 1), load_each_under_another)
    return {size: run_on_ranks(size, program, folder) for size, program in programs.items()}


@pytest.fixture(scope="module")
def exact(folder: Path) -> dict[str, runs.States]:
    """The state of the plain run in float64, by optimizer."""
    return {name: runs.plain_run(runs.recipe_of(folder, optimizer=name)) for name in OPTIMIZERS}


def worst(folder: Path, run: str, other: runs.States) -> float:
    return max(runs.difference(runs.final_state(folder / run), other).values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_what_plain_torch_trains_on_one_rank_in_float64(
    folder, ratios, exact, engine, optimizer
):
    run = f"{engine} {optimizer} fp32 on {ranks_of(engine)}"
    assert worst(folder, run, exact[optimizer]) < 1e-6


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "hsdp"])
def test_in_float64_engines_differ_by_rounding_only(folder, ratios, engine):
    exact = runs.plain_run(runs.recipe_of(folder), num_steps=FEW_STEPS)
    assert worst(folder, f"{engine} lars fp64 on {ranks_of(engine)}", exact) < 1e-13


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_runs_agree_with_ddp(folder, ratios, engine):
    """With one optimizer: its weights and its arithmetic are those of fp32."""
    size = ranks_of(engine)
    ddp = runs.final_state(folder / f"ddp lars bf16 on {size}")
    assert worst(folder, f"{engine} lars bf16 on {size}", ddp) < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_compared_weights_have_moved(exact, optimizer):
    online, _ = runs.build_tiny_nets(seed=0)
    for name, start in online.named_parameters():
        moved = exact[optimizer][f"online.{name}"] - start.detach()
        assert moved.norm() >= 1e-3 * start.norm(), name


@pytest.mark.parametrize("engine", FAULTY_ENGINES)
@pytest.mark.parametrize("fault", [*FAULTS, "batch norm of a rank"])
def test_the_comparison_notices(folder, ratios, engine, fault):
    exact = runs.plain_run(runs.recipe_of(folder), num_steps=FAULTY_STEPS)
    assert worst(folder, f"{engine} {fault}", exact) > 1e-5


@pytest.mark.parametrize(
    ("size", "engine"), [*product((1, 2, 3), ENGINES), (4, "hsdp")], ids=lambda value: str(value)
)
def test_trust_ratios_of_layers_are_the_plain_ones(folder, ratios, engine, size):
    recipe = runs.recipe_of(folder)
    plain = runs.plain_ratios(recipe)
    sizes = {name: p.numel() for name, p in runs.build_tiny_nets(0)[0].named_parameters()}
    straddles = is_empty = False
    for name, numel in sizes.items():
        expected = plain.get(name, 1.0)
        by_rank = [of_rank[engine][name] for of_rank in ratios[size]]
        parts = [part for found in by_rank for part in found]
        assert all(ratio == pytest.approx(expected, rel=1e-5) for ratio, _, _ in parts), name
        covered = {i for _, start, size in parts for i in range(start, start + size)}
        assert covered == set(range(numel)), name
        straddles |= any(start > 0 for _, start, _ in parts)
        is_empty |= not all(by_rank)
    is_split = engine != "ddp" and size > 1 and (engine, size) != ("hsdp", 2)  # two nodes of one
    assert straddles == is_empty == is_split


def test_checkpoints_of_all_engines_hold_the_same_tensors(folder, ratios):
    """So that any of them goes on under any other as it does under its neighbour."""
    shapes = [
        {k: (x.shape, x.dtype) for k, x in runs.final_state(folder / f"{engine} saved").items()}
        for engine in ENGINES
    ]
    assert all(own == shapes[0] for own in shapes)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("saved", "engine"), NEIGHBOURS.items())
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_ranks(
    folder, ratios, saved, engine, size
):
    whole = runs.final_state(folder / f"{saved} whole")
    assert worst(folder, f"{saved} to {engine} on {size}", whole) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_goes_on_to_the_bit_under_the_same_engine(folder, ratios, engine):
    whole = runs.final_state(folder / f"{engine} whole")
    resumed = runs.final_state(folder / f"{engine} to {engine} on {ranks_of(engine)}")
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_a_difference_of_nothing_and_of_not_a_number_are_told_apart():
    good, bad = {"online.w": torch.ones(2)}, {"online.w": torch.tensor([1.0, math.nan])}
    assert runs.difference(good, good) == {"online": 0.0}
    assert runs.difference(bad, good) == {"online": math.inf}
