"""Promises of the batch norm that is synchronised over ranks."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_smog.errors import UserError
from scale_smog.models import process_group_for, synchronise_batch_norm
from scale_smog.models.sync_batch_norm import SynchronisedBatchNorm

SHARES = [3, 5, 2, 6]  # images of each rank: uneven on purpose
UNUSED_GROUP: Any = object()  # conversion and evaluation mode never talk to the group


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input whose mean is large beside its spread, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = 30 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    grad_y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), grad_y.to(dtype)


def batch_norm(x: Tensor, affine: bool) -> nn.Module:
    kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = kind(x.shape[1], affine=affine, dtype=dtype)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm


def train_step(norm: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad_y)
    results = {"y": y.detach(), "grad_x": x.grad, **dict(norm.named_buffers())}
    return results | {f"grad_{name}": p.grad for name, p in norm.named_parameters()}


def train_step_of_this_rank(
    scope: str | int, shape: tuple[int, ...], dtype: torch.dtype, affine: bool
) -> dict[str, Tensor]:
    x, grad_y = batch(shape, dtype)
    norm = synchronise_batch_norm(batch_norm(x, affine), process_group_for(scope, ranks_per_node=2))
    shares, rank = SHARES[: dist.get_world_size()], dist.get_rank()
    return train_step(norm, x.split(shares)[rank], grad_y.split(shares)[rank])


def of_whole_batch(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all ranks in order, parameter gradients summed, buffers, which must agree, once."""
    whole = {}
    for key in ranks[0]:
        values = [rank[key] for rank in ranks]
        if key in ("y", "grad_x"):
            whole[key] = torch.cat(values)
        elif key in ("grad_weight", "grad_bias"):
            whole[key] = torch.stack(values).sum(dim=0)
        else:
            assert all(torch.equal(value, values[0]) for value in values), key
            whole[key] = values[0]
    return whole


@pytest.mark.parametrize(
    ("shape", "dtype", "affine", "tolerance"),
    [
        ((8, 6, 5, 5), torch.float64, True, 1e-12),
        ((8, 6, 5, 5), torch.float32, True, 1e-6),
        ((8, 6), torch.float64, False, 1e-12),
    ],
)
def test_synchronised_statistics_equal_the_concatenated_batch(
    shape: tuple[int, ...], dtype: torch.dtype, affine: bool, tolerance: float
) -> None:
    ranks = run_on_ranks(2, train_step_of_this_rank, "global", shape, dtype, affine)
    x, grad_y = batch(shape, dtype)
    exact = train_step(batch_norm(x, affine).double(), x.double(), grad_y.double())
    for key, value in of_whole_batch(ranks).items():
        assert value.dtype in (dtype, torch.int64), key
        error = (value - exact[key]).abs().max() / exact[key].abs().max()
        assert error <= tolerance, key


def steps_in_pairs_of_this_rank(shape: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [train_step_of_this_rank(scope, shape, torch.float64, True) for scope in (2, "node")]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share, num = counts[:, None] / counts.sum(), counts.sum()
    mean = (share * means).sum(0)
    var = (share * (inverse_stds**-2 - eps + (means - mean).square())).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * num / (num - 1), momentum)
    return mean, (var + eps).rsqrt()


def elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    scale, shift = weight * inverse_std, bias - weight * inverse_std * mean
    return x * scale[:, None, None] + shift[:, None, None]


def backward_reduce(
    grad_y: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    sum_dy = grad_y.sum((0, 2, 3))
    sum_dy_xmu = (grad_y * (x - mean[:, None, None])).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * inverse_std, sum_dy


def backward_elemt(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32 and counts.is_contiguous()  # the kernel reads it raw
    of_mean, of_std = sum_dy / counts.sum(), inverse_std**2 * sum_dy_xmu / counts.sum()
    rest = (x - mean[:, None, None]) * of_std[:, None, None] + of_mean[:, None, None]
    return (grad_y - rest) * (weight * inverse_std)[:, None, None]


class Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gpu_step_of_this_rank(shares: list[int], is_even: bool) -> dict[str, Tensor]:
    """The way of a GPU, on a CPU: torch's five kernels are replaced by what they compute."""
    for function in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        setattr(torch, f"batch_norm_{function.__name__}", function)
    x, grad_y = batch((8, 6, 5, 5), torch.float64)
    norm = synchronise_batch_norm(batch_norm(x, affine=True), dist.group.WORLD, is_even=is_even)
    norm.forward = partial(norm._forward_on_gpu, group=dist.group.WORLD)
    rank = dist.get_rank()
    with Operations() as operations:
        results = train_step(norm, x.split(shares)[rank], grad_y.split(shares)[rank])
    assert "cat" in operations.names
    assert not operations.names & {"nonzero", "index", "_local_scalar_dense"}  # they would wait
    return results


@pytest.mark.parametrize(("shares", "is_even"), [(SHARES[:2], False), ([4, 4], True)])
def test_on_a_gpu_the_statistics_are_the_batchs_too_and_nothing_waits_for_it(
    shares: list[int], is_even: bool
) -> None:
    whole = of_whole_batch(run_on_ranks(2, gpu_step_of_this_rank, shares, is_even))
    x, grad_y = batch((8, 6, 5, 5), torch.float64)
    torch.testing.assert_close(whole, train_step(batch_norm(x, True), x, grad_y))


def test_sub_groups_share_statistics_among_themselves_only() -> None:
    shape = (sum(SHARES), 6)
    ranks, of_nodes = zip(*run_on_ranks(4, steps_in_pairs_of_this_rank, shape), strict=True)
    torch.testing.assert_close(of_nodes, ranks, rtol=0, atol=0)

    x, grad_y = batch(shape, torch.float64)
    halves = [sum(SHARES[:2]), sum(SHARES[2:])]
    for pair, pair_x, pair_grad in zip(
        (ranks[:2], ranks[2:]), x.split(halves), grad_y.split(halves), strict=True
    ):
        expected = train_step(batch_norm(pair_x, affine=True), pair_x, pair_grad)
        torch.testing.assert_close(of_whole_batch(pair), expected, rtol=1e-10, atol=1e-12)


def bfloat16_step_of_this_rank() -> tuple[dict[str, Tensor], dict[str, bool]]:
    x, grad_y = batch((4, 6, 5, 5), torch.bfloat16)
    x, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y))
    norm = synchronise_batch_norm(batch_norm(x, affine=True), dist.group.WORLD)
    results = train_step(norm, x.tensor_split(2)[dist.get_rank()], grad_y.tensor_split(2)[0])
    layouts = {
        key: results[key].is_contiguous(memory_format=torch.channels_last)
        for key in ("y", "grad_x")
    }
    return results, layouts


def test_bfloat16_inputs_have_float32_statistics_and_keep_their_layout() -> None:
    ranks = run_on_ranks(2, bfloat16_step_of_this_rank)
    whole = of_whole_batch([results for results, _ in ranks])
    assert all(layouts == {"y": True, "grad_x": True} for _, layouts in ranks)
    assert whole["y"].dtype == whole["grad_x"].dtype == torch.bfloat16

    x, grad_y = batch((4, 6, 5, 5), torch.bfloat16)
    exact = train_step(batch_norm(x, affine=True), x.float(), grad_y.float())
    for key in ("running_mean", "running_var"):
        assert whole[key].dtype == torch.float32
        torch.testing.assert_close(whole[key], exact[key], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole["y"], exact["y"].bfloat16())


def groups_of_this_rank() -> dict[str, Any]:
    with pytest.raises(UserError, match="2 ranks do not split into groups of 3"):
        process_group_for(3)
    return {
        "global": dist.get_world_size(process_group_for("global")),
        "all ranks": dist.get_world_size(process_group_for(2)),
        "its own": process_group_for("global") is not dist.group.WORLD,
        "local": process_group_for("local"),
        "one": process_group_for(1),
    }


def test_scopes_name_the_ranks_that_share_in_a_group_of_their_own() -> None:
    expected = {"global": 2, "all ranks": 2, "its own": True, "local": None, "one": None}
    assert run_on_ranks(2, groups_of_this_rank) == [expected] * 2


def test_a_single_process_needs_no_group() -> None:
    assert [process_group_for(s, 8) for s in ("global", "node", 8, "local")] == [None] * 4


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}])
def test_a_rank_alone_computes_to_the_bit_what_torch_does(settings: dict[str, bool]) -> None:
    x, grad_y = batch((8, 6, 5, 5), torch.float32)
    plain = nn.Sequential(nn.BatchNorm2d(6, **settings), nn.BatchNorm2d(6, **settings))
    alone = synchronise_batch_norm(copy.deepcopy(plain), None)
    found = []
    for net in (plain, alone):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            net(leaf).backward(grad_y)
        found.append([leaf.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scope", ["host", "node", 0])
def test_unknown_scopes_are_refused(scope: str | int) -> None:
    with pytest.raises(UserError, match=f"batch_norm: {scope!r} is none of"):
        process_group_for(scope)


def test_conversion_keeps_names_tensors_and_settings() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)).eval(),
        nn.BatchNorm1d(4, affine=False),
    )
    before = net.state_dict(keep_vars=True)
    converted = synchronise_batch_norm(net, UNUSED_GROUP)
    after = converted.state_dict(keep_vars=True)
    assert converted is net
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)

    inner, last = net[1][0], net[2]
    assert isinstance(inner, SynchronisedBatchNorm) and isinstance(last, SynchronisedBatchNorm)
    assert (inner.eps, inner.momentum, inner.affine, inner.training) == (1e-3, 0.2, True, False)
    assert (last.weight, last.bias, last.affine, last.training) == (None, None, False, True)


def test_evaluation_uses_the_running_statistics() -> None:
    x, grad_y = batch((8, 6, 5, 5), torch.float32)
    norm = batch_norm(x, affine=True)
    train_step(norm, x, grad_y)
    expected = norm.eval()(x)
    assert torch.equal(synchronise_batch_norm(norm, UNUSED_GROUP)(x), expected)


def test_timms_fused_activation_survives_the_conversion() -> None:
    from timm.layers import BatchNormAct2d

    x, _ = batch((8, 6, 5, 5), torch.float32)
    net = nn.Sequential(BatchNormAct2d(6)).eval()
    expected = net(x - 30)
    assert (expected == 0).any()
    assert torch.equal(synchronise_batch_norm(net, UNUSED_GROUP)(x - 30), expected)
