"""Collectives over all ranks, the differentiable all-reduce among them."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog.distributed.process_group import is_main, rank, rank_and_host, world_size
from scale_smog.errors import UserError

T = TypeVar("T")
GATHERED_AT_ONCE = 2**28  # bytes


def barrier() -> None:
    """Waits for all ranks (on the CPU: no GPU work is synchronised)."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums `x` in place over the ranks of `group` and returns it. No gradient."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format))


def differentiable_all_reduce(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, with the gradient of the sum of all ranks' losses.

    An engine that averages parameter gradients over ranks then has exactly the gradient of the
    mean loss, as if one rank had held the whole batch. Every rank must run forward and backward.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def differentiable_all_gather(x: Tensor) -> Tensor:
    """`x` of all ranks [W, ...], in rank order; gradients as of `differentiable_all_reduce`."""
    if world_size() == 1:
        return x[None]
    own = torch.arange(world_size(), device=x.device) == rank()
    return differentiable_all_reduce(own.view(-1, *[1] * x.dim()) * x)  # one rank's x, and zeros


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_object(value: T) -> T:
    """Rank 0's picklable `value` on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def call_on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls a function on every rank; what it returned there, in rank order; a collective.

    Raises:
        OSError: on every rank, if it did so on one; with the rank's name.
        UserError: likewise.
    """
    outcomes = gather_objects(_outcome(function), group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]  # pyright: ignore[reportReturnType]


def call_on_main(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls a function on rank 0; what it returned, on every rank; a collective.

    What all ranks need and would each read from a shared disk, one reads.

    Raises:
        OSError: on every rank, if rank 0 met it; with the rank's name.
        UserError: likewise.
    """
    outcome = _outcome(function) if is_main() else (None, None)
    if world_size() > 1:
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=group)
        (outcome,) = box
    result, error = outcome
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a function returns, or what all ranks are to raise."""
    try:
        return function(), None
    except UserError as error:
        return None, error
    except OSError as error:
        return None, OSError(_where(error))


def _where(error: OSError) -> str:
    where = f"{rank_and_host()}: " if world_size() > 1 else ""
    words = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return where + (words or str(error))


def gather_columns(x: Tensor) -> Tensor:
    """Joins `x` of all ranks along dimension 1, in rank order.

    Little more memory than the result's: ImageNet's features fill half of a GPU.

    Args:
        x: [S, B, ...] on the CPU or this rank's device, of the same shape on every rank.

    Returns:
        [S, W * B, ...] on every rank.
    """
    if world_size() == 1:
        return x
    whole = x.new_empty(x.shape[0], world_size() * x.shape[1], *x.shape[2:])
    num = max(1, GATHERED_AT_ONCE // max(1, whole[:1].nbytes))
    for rows, own in zip(whole.split(num), x.split(num), strict=True):  # [num, ...]
        partitions = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(partitions, own.contiguous())
        torch.cat(partitions, dim=1, out=rows)
    return whole
