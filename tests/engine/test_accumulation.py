"""What a step over micro-batches means, and what it and checkpointing save."""

from functools import partial

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from scale_smog import UserError
from scale_smog.config import EngineConfig
from scale_smog.engine.stages import prepare_stages
from scale_smog.models import stages, synchronise_batch_norm

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
NUM_STEPS = 3


def train_in_micro_batches(folder):
    for engine in ENGINES:
        recipe = runs.recipe_of(folder / engine, kind=engine, accumulate=4, clip_norm=0.5)
        runs.run(recipe, runs.build_state(recipe), NUM_STEPS)


def test_micro_batches_equal_one_large_batch_but_for_the_batch_norm_on_every_engine(tmp_path):
    """The reference passes all rows through one graph; batch norm sees a micro-batch at a time."""
    run_on_ranks(2, train_in_micro_batches, tmp_path)
    recipe = runs.recipe_of(tmp_path, accumulate=4, clip_norm=0.5)
    exact = runs.plain_run(recipe, world_size=2, num_steps=NUM_STEPS)
    for engine in ENGINES:
        state = runs.final_state(tmp_path / engine)
        assert max(runs.difference(state, exact).values()) < 1e-6, engine


def train_and_note_what_stays_gathered(folder) -> list[bool]:
    """Of the online net's weights, after each pass that has a pass backward."""
    recipe = runs.recipe_of(folder, kind="zero3", accumulate=2)
    state = runs.build_state(recipe)
    kept = []

    def note(net: nn.Module, *_: object) -> None:
        if torch.is_grad_enabled():
            kept.append(all(p.numel() for p in net.parameters()))

    state.engine.online.register_forward_hook(note)
    runs.run(recipe, state, NUM_STEPS)
    return kept


def test_weights_that_zero3_gathers_stay_for_the_backward_pass(tmp_path):
    [kept] = run_on_ranks(1, train_and_note_what_stays_gathered, tmp_path)
    assert kept == [False] * 2 + [True] * 4  # in its first step DeepSpeed learns the passes' order


def without_batch_statistics(net: nn.Module) -> nn.Module:
    for name, child in net.named_children():
        is_norm = isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d)
        norm = nn.GroupNorm(1, child.num_features) if is_norm else without_batch_statistics(child)
        net.add_module(name, norm)
    return net


@pytest.mark.parametrize("detach", [False, True])
def test_without_batch_norm_micro_batches_equal_one_large_batch_exactly(
    tmp_path, monkeypatch, detach
):
    build = runs.build_tiny_nets
    monkeypatch.setattr(
        runs, "build_tiny_nets", lambda *x: [without_batch_statistics(net) for net in build(*x)]
    )
    for accumulate in (1, 4):
        recipe = runs.recipe_of(tmp_path / str(accumulate), accumulate=accumulate, precision="fp64")
        state = runs.build_state(recipe)
        state.method.groups.detach = detach
        runs.run(recipe, state)
    one, four = (runs.final_state(tmp_path / name) for name in ("1", "4"))
    assert max(runs.difference(four, one).values()) < 1e-13


def test_micro_batches_and_checkpointing_count_every_batch_once(tmp_path):
    counts = {}
    for name, settings in {
        "plain": {},
        "checkpointed": {"activation_checkpointing": True},
        "both": {"activation_checkpointing": True, "accumulate": 2},
    }.items():
        recipe = runs.recipe_of(tmp_path / name, precision="fp64", **settings)
        state = runs.build_state(recipe)
        runs.run(recipe, state, NUM_STEPS)
        buffers = dict(state.engine.online.named_buffers())
        counts[name] = buffers["backbone.layer1.1.num_batches_tracked"].item()
    # A large and a small view a step; twice as many in two micro-batches.
    assert counts == {"plain": 2 * NUM_STEPS, "checkpointed": 2 * NUM_STEPS, "both": 4 * NUM_STEPS}
    plain, checkpointed = (runs.final_state(tmp_path / x) for x in ("plain", "checkpointed"))
    assert not [name for name in plain if not torch.equal(plain[name], checkpointed[name])]


def held_bytes(**settings) -> int:
    """Bytes that the graph of the online net's forward pass and the loss holds."""
    recipe = runs.recipe_of(".", **settings)
    state = runs.build_state(recipe)
    held: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    large, small = runs.global_batch(0)
    weights = {p.untyped_storage().data_ptr() for p in state.engine.online.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        state.engine.forward_online(large[0], [small])
    return sum(size for pointer, size in held.items() if pointer not in weights)


def test_checkpointing_holds_less_for_the_backward_pass():
    assert held_bytes(activation_checkpointing=True) < 0.6 * held_bytes()


def test_a_batch_that_does_not_split_is_refused(tmp_path):
    recipe = runs.recipe_of(tmp_path, accumulate=5)
    with pytest.raises(UserError, match=r"engine.accumulate=5 does not split the 24 images"):
        runs.build_state(recipe)


def test_a_stage_of_a_rank_alone_is_compiled_as_a_whole(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    online, momentum = runs.build_tiny_nets(seed=0)
    for net in (online, momentum):
        synchronise_batch_norm(net, None)
    prepare_stages(online, momentum, EngineConfig(compile=True))
    for _ in range(2):
        online(torch.rand(4, 3, 16, 16), [])
    counts = [x for name, x in online.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(x == 2 for x in counts)


def test_compiled_stages_train_the_same_model(tmp_path, monkeypatch):
    """Checkpointed as well: the recomputation must run the same compiled code."""
    # All of the compiler but its C++ back end, which takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name, settings in {"plain": {}, "compiled": {"compile": True}}.items():
        recipe = runs.recipe_of(tmp_path / name, activation_checkpointing=True, **settings)
        state = runs.build_state(recipe)
        runs.run(recipe, state, num_steps=2)
        is_wrapped = ["forward" in vars(x) for x in stages(state.engine.online.backbone)]
        assert is_wrapped == [True, True]
    plain, compiled = (runs.final_state(tmp_path / name) for name in ("plain", "compiled"))
    assert max(runs.difference(compiled, plain).values()) < 1e-6
