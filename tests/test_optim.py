"""LARS against a plain reference, whole and in parts."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn

from scale_smog.config import OptimizerConfig
from scale_smog.optim import (
    Lars,
    ParameterPartition,
    build_optimizer,
    clip_gradients,
    ema_update,
    layer_norms,
    set_rates,
)

SHAPES = {"conv": (6, 3, 3, 3), "conv.bias": (6,), "fc": (5, 7), "zero": (4, 4), "one": (1, 9)}
LR, DECAY, MOMENTUM, TRUST = 0.4, 1e-2, 0.9, 1e-3


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["zero"].zero_()
    return made


def plain_lars(num_steps: int) -> dict[str, torch.Tensor]:
    """One parameter at a time, in float64."""
    values = {name: x.double() for name, x in tensors(0).items()}
    buffers = {name: torch.zeros_like(x) for name, x in values.items()}
    for step in range(num_steps):
        for name, gradient in tensors(step + 1).items():
            w, g, update = values[name], gradient.double(), gradient.double()
            if w.dim() > 1:
                ratio = 1.0
                if w.norm() > 0 and g.norm() > 0:
                    ratio = TRUST * w.norm() / (g.norm() + DECAY * w.norm())
                update = ratio * (g + DECAY * w)
            buffers[name] = MOMENTUM * buffers[name] + update
            values[name] = w - LR * buffers[name]
    return values


def run_lars(num_steps: int, cuts: list[int]) -> torch.Tensor:
    """All parameters flattened one behind another; this rank updates from its cut to the next."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    flat = torch.cat([x.flatten() for x in tensors(0).values()])
    low, high = cuts[rank], cuts[rank + 1]
    partitions, spans, start = [], [], 0
    for number, (name, shape) in enumerate(SHAPES.items()):
        size = torch.Size(shape).numel()
        first, last = max(start, low), min(start + size, high)
        if first < last:
            value = nn.Parameter(flat[first:last])
            is_excluded = len(shape) <= 1
            partitions.append(ParameterPartition(name, number, value, first - start, is_excluded))
            spans.append((first, last))
        start += size
    config = OptimizerConfig(name="lars", momentum=MOMENTUM)
    optimizer = build_optimizer(config, partitions)
    assert isinstance(optimizer, Lars)
    values = [part.value for part in partitions]
    layer_ids = [part.layer_id for part in partitions]
    group = dist.group.WORLD if world_size > 1 else None
    for step in range(num_steps):
        gradient = torch.cat([x.flatten() for x in tensors(step + 1).values()])
        for part, (first, last) in zip(partitions, spans, strict=True):
            part.value.grad = gradient[first:last]
        set_rates(optimizer, LR, DECAY)
        tensors_here = [values, [gradient[first:last] for first, last in spans]]
        index = torch.tensor(layer_ids, dtype=torch.long)
        norms = layer_norms(tensors_here, index, len(SHAPES), group, torch.float32)
        by_layer = list(zip(*norms.tolist(), strict=True))
        of_values = zip(values, layer_ids, strict=True)
        optimizer.step(norms={value: by_layer[number] for value, number in of_values})
    return flat[low:high].clone()


TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.mark.parametrize(
    "cuts",
    [
        [0, TOTAL],
        [0, 100, TOTAL],  # the convolution straddles
        [0, 40, 165, TOTAL],
        [0, 200, 200, TOTAL],  # a rank that holds nothing
    ],
)
def test_layers_in_any_parts_are_scaled_as_whole_layers(cuts):
    expected = torch.cat([x.flatten() for x in plain_lars(4).values()])
    world_size = len(cuts) - 1
    parts = [run_lars(4, cuts)] if world_size == 1 else run_on_ranks(world_size, run_lars, 4, cuts)
    assert (torch.cat(parts).double() - expected).abs().max() < 1e-6


def test_an_ordinary_model_can_use_lars():
    model = nn.Linear(4, 3)
    optimizer = Lars(model.parameters(), lr=0.1, weight_decay=1e-4)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    moved = (model.weight - before).norm() / before.norm()
    assert 0 < moved < 2e-4  # lr x trust


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_layers_are_scaled_with_and_without_momentum(momentum):
    value = nn.Parameter(torch.full((2, 2), 3.0))
    value.grad = torch.ones(2, 2)
    Lars([value], lr=1.0, momentum=momentum, trust=0.01).step()
    assert value.tolist() == [[pytest.approx(3 - 0.01 * 6 / 2)] * 2] * 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_excluded_parameters_do_not_decay(name):
    values = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    partitions = [
        ParameterPartition(str(i), i, value, 0, excluded)
        for i, (value, excluded) in enumerate(zip(values, (False, True), strict=True))
    ]
    optimizer = build_optimizer(OptimizerConfig(name=name), partitions)
    for value in values:
        value.grad = torch.zeros(3)
    set_rates(optimizer, 0.1, 0.5)
    optimizer.step()
    assert torch.equal(values[1].detach(), torch.ones(3))
    assert (values[0] < 1).all()


@pytest.mark.parametrize(
    "shape", [(512, 512, 3, 3), (2048, 1024), (1, 2**21), (2**21 + 5,), (7,), ()]
)
def test_norms_have_the_digits_of_float32_however_large_the_layer(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    found = layer_norms([[x]], torch.zeros(1, dtype=torch.long), 1, None, torch.float32)
    torch.testing.assert_close(found.item(), x.double().norm().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [0.1, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(length):
    """Longer ones to the norm that is asked for; shorter ones stay."""
    values = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    for step, value in enumerate(values):
        value.grad = length * torch.arange(value.numel()).view_as(value).add(step).float()
    theirs = [nn.Parameter(value.detach().clone()) for value in values]
    for value, other in zip(values, theirs, strict=True):
        assert value.grad is not None
        other.grad = value.grad.clone()
    gradients = [value.grad for value in values if value.grad is not None]
    norms = [gradient.norm().item() for gradient in gradients]
    clipped = clip_gradients(gradients, 2.0, norms)
    torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    assert clipped == pytest.approx([gradient.norm().item() for gradient in gradients])
    for value, other in zip(values, theirs, strict=True):
        assert value.grad is not None and other.grad is not None
        torch.testing.assert_close(value.grad, other.grad)


def test_a_rank_that_holds_no_row_of_any_weight_clips_and_moves_nothing():
    assert clip_gradients([], 1.0, [3.0, 4.0]) == pytest.approx([0.6, 0.8])
    ema_update([], [], 0.1)


LAYOUTS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.001, 0.1])
@pytest.mark.parametrize("layouts", itertools.product(LAYOUTS, LAYOUTS), ids=str)
def test_the_momentum_update_is_lerp_to_the_bit_in_any_layout(dtype, weight, layouts):
    shapes = [(7, 5, 3, 3), (1, 130, 1, 1), (64, 3, 7, 7)]
    means, values = (
        [torch.randn(shape, dtype=dtype).to(memory_format=layout) for shape in shapes]
        for layout in layouts
    )
    kept = [x.clone() for x in values]
    wanted = [x.lerp(y, weight) for x, y in zip(means, values, strict=True)]
    ema_update(means, values, weight)
    assert all(torch.equal(x, y) for x, y in zip(means, wanted, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(values, kept, strict=True))
