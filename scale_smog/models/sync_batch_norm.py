"""Batch normalisation over a group of ranks, on GPUs and on CPUs alike."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from scale_smog import distributed
from scale_smog.errors import UserError

# Shapes: B images per rank, C channels, W ranks of the group; x is [B, C] or [B, C, H, W].


def process_group_for(
    scope: str | int, ranks_per_node: int | None = None
) -> dist.ProcessGroup | None:
    """A new process group over which this rank shares its batch statistics.

    This is a collective: it makes groups, so all ranks call it, with the same arguments. A group
    of its own has its own communicator, so small messages do not queue behind large ones.

    Args:
        scope: `"global"` (all ranks), `"node"` (the ranks of one host), a number of neighbouring
            ranks, or `"local"` (each rank by itself).
        ranks_per_node: Ranks of each host; needed by `"node"` only.

    Returns:
        The group, or None where no other rank takes part (`"local"`, or a single process).

    Raises:
        UserError: The scope is unknown, or its number of ranks does not divide the world size.
    """
    world_size = distributed.world_size()
    sizes: dict[str | int, int | None] = {"global": world_size, "node": ranks_per_node, "local": 1}
    size = sizes.get(scope, scope)
    if not isinstance(size, int) or size < 1:
        raise UserError(
            f"batch_norm: {scope!r} is none of 'global', 'local', a number of ranks, "
            "and 'node' with its ranks_per_node"
        )
    if size == 1 or world_size == 1:
        return None
    if world_size % size:
        raise UserError(f"batch_norm: {world_size} ranks do not split into groups of {size}")
    group, _ = dist.new_subgroups(size, timeout=distributed.collective_timeout())  # neighbours
    return group


def synchronise_batch_norm(
    module: nn.Module, group: dist.ProcessGroup | None, *, is_even: bool = False
) -> nn.Module:
    """Replaces every batch norm of `module`, in place, by one with the statistics of `group`.

    Parameters and buffers stay the same objects under the same names.

    Args:
        module: Any module tree; `num_batches_tracked` counts once it has passed as a whole.
        group: The ranks to share statistics with; None: each has its own, as torch computes them.
        is_even: Every rank of the group always has as many images, of the same size, as this one.

    Returns:
        `module`, or its replacement where `module` is itself a batch norm.
    """
    passes = _TrackedPasses()
    synchronised = _synchronise(module, group, passes, is_even)
    synchronised.register_forward_hook(passes.count)
    return synchronised


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode leave their running statistics alone.

    For a forward pass that repeats another one.
    """
    # Copies take the updates: autograd must see the same operations as in the first pass.
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [(norm, name, x) for norm in norms for name, x in norm.named_buffers(recurse=False)]
    for dtype in {x.dtype for *_, x in kept}:  # on a GPU a launch each, not hundreds
        own = [one for one in kept if one[2].dtype == dtype]
        copies = [torch.empty_like(x) for *_, x in own]
        torch._foreach_copy_(copies, [x for *_, x in own])
        for (norm, name, _), copy in zip(own, copies, strict=True):
            setattr(norm, name, copy)
    try:
        yield
    finally:
        for norm, name, statistic in kept:
            setattr(norm, name, statistic)


def unsynchronised_running_stats(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Running means and variances [C] that differ between ranks: of scopes below global."""
    if distributed.world_size() == 1:
        return []
    norms = [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm)]
    unshared = [m for m in norms if not _spans_all_ranks(m)]
    statistics = [x for m in unshared for x in (m.running_mean, m.running_var)]
    return [x for x in statistics if x is not None]


@torch.no_grad()
def average_running_stats(statistics: list[Tensor]) -> None:
    """Replaces running statistics by their mean over all ranks; one all-reduce.

    As running statistics are linear in those of the batches, this gives what one would have had
    by averaging the batches' statistics over the scopes.
    """
    if statistics:
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        flat /= distributed.world_size()
        torch._foreach_copy_(statistics, flat.split([len(x) for x in statistics]))


def _spans_all_ranks(norm: nn.Module) -> bool:
    group = getattr(norm, "process_group", None)
    return group is not None and dist.get_world_size(group) == distributed.world_size()


class _TrackedPasses:
    """Counts a net's passes for all its norms at once: on a GPU one operation, not one a norm."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []  # `num_batches_tracked` [], once for each pass

    def note(self, num_batches_tracked: Tensor) -> None:
        """A norm has seen a batch."""
        self._pending.append(num_batches_tracked)

    @torch.no_grad()
    def count(self, *_: object) -> None:
        """Adds what has been noted; the forward hook of the net."""
        num_passes, self._pending = Counter(self._pending), []
        for num in set(num_passes.values()):
            torch._foreach_add_([x for x, times in num_passes.items() if times == num], num)


def _synchronise(
    module: nn.Module, group: dist.ProcessGroup | None, passes: _TrackedPasses, is_even: bool
) -> nn.Module:
    synchronised = module
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        synchronised = _synchronised_copy(module, group)
        synchronised.passes, synchronised.is_even, synchronised._counts = passes, is_even, {}
    for name, child in module.named_children():
        synchronised.add_module(name, _synchronise(child, group, passes, is_even))
    return synchronised


def _synchronised_copy(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, group: dist.ProcessGroup | None
) -> "SynchronisedBatchNorm":
    copy = SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum, affine=False)
    copy.process_group = group
    copy.affine, copy.training = norm.affine, norm.training
    copy.track_running_stats = norm.track_running_stats
    copy.weight, copy.bias = norm.weight, norm.bias
    copy.running_mean, copy.running_var = norm.running_mean, norm.running_var
    copy.num_batches_tracked = norm.num_batches_tracked
    return copy


class _Count(NamedTuple):
    """Values a channel: of every rank [W] where all have the same, else of this rank [1]."""

    values: Tensor  # in the dtype of the statistics
    integers: Tensor  # int32
    is_even: bool


class SynchronisedBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` that also takes CPU tensors, which the original refuses.

    Without a group it is torch's plain batch norm, but for the count of batches, which is kept for
    all norms of a net at once: they train as parts of that net.

    It borrows the original's kernels for GPUs and is no subclass of it: DistributedDataParallel
    refuses those on the CPU.

    Statistics are float32 (float64 for float64 inputs) and cover the group's whole batch, however
    it is spread over the ranks; outputs keep the dtype and the memory format of the input.
    Gradients of weight and bias are this rank's: data-parallel training averages them.
    """

    process_group: dist.ProcessGroup | None
    passes: _TrackedPasses
    is_even: bool
    _counts: dict[int, _Count]
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalises its input [B, C] or [B, C, H, W]; a collective in training mode."""
        group = self.process_group
        if not self.training:
            y = nn.SyncBatchNorm.forward(self, input)  # pyright: ignore[reportArgumentType]
        elif group is None:
            y = self._forward_alone(input)
        elif input.is_cuda:
            y = self._forward_on_gpu(input, group)
        else:
            y = self._forward_on_cpu(input, group)
        # timm's BatchNormAct2d has its dropout and activation as children; others have none.
        for child in self.children():
            y = child(y)
        return y

    def _forward_alone(self, x: Tensor) -> Tensor:
        running, momentum = (None, None), 0.0
        if self.track_running_stats:
            running, momentum = (self.running_mean, self.running_var), self._next_momentum()
        return F.batch_norm(x, *running, self.weight, self.bias, True, momentum, self.eps)

    def _forward_on_cpu(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        with torch.no_grad():
            mean, var, count = _group_statistics(_upcast(x), group)
            if self.track_running_stats:
                self._track(mean, var * (count / (count - 1)))
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps, group)

    def _forward_on_gpu(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if self.track_running_stats:
            running, momentum = (self.running_mean, self.running_var), self._next_momentum()
        else:  # without them torch's kernels take the counts in the dtype of x, which may be bf16
            running, momentum = x.new_zeros(2, x.shape[1], dtype=_statistics_dtype(x)), 0.0
        count = self._count(x, group)
        return _NormaliseOnGpu.apply(
            x, self.weight, self.bias, *running, self.eps, momentum, group, count
        )

    def _count(self, x: Tensor, group: dist.ProcessGroup) -> _Count:
        """Made once for each size of input: a norm sees one or two."""
        num_values, dtype = x.numel() // x.shape[1], _statistics_dtype(x)
        if num_values not in self._counts:
            num_ranks = dist.get_world_size(group) if self.is_even else 1
            each = torch.full((num_ranks,), num_values, dtype=torch.int32, device=x.device)
            self._counts[num_values] = _Count(each.to(dtype), each, self.is_even)
        return self._counts[num_values]

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        momentum = self._next_momentum()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)

    def _next_momentum(self) -> float:
        """Counts a batch; its weight in the running statistics."""
        assert self.num_batches_tracked is not None
        if self.momentum is None:  # the average of all batches, as in torch
            return 1 / self.num_batches_tracked.add_(1).item()
        if torch.compiler.is_compiling():  # a list that grows would be looked at in every pass
            self.num_batches_tracked.add_(1)
        else:
            self.passes.note(self.num_batches_tracked)
        return self.momentum


def _group_statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and values per channel [1] of the group; one all-gather."""
    mean, var = torch.batch_norm_update_stats(x, None, None, momentum=0.0)  # [C], [C]
    local = torch.cat([mean, var, mean.new_tensor([x.numel() / x.shape[1]])])  # [2C + 1]
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group)
    per_rank = torch.stack(gathered)  # [W, 2C + 1]
    means, variances, counts = per_rank.split([len(mean), len(mean), 1], dim=1)

    # Variance within the ranks' batches plus variance between their means. Sums of squares would
    # merge with less ado, and cancel where the mean is large.
    count = counts.sum(dim=0)  # [1]
    share = counts / count  # [W, 1]
    mean = (share * means).sum(dim=0)
    var = (share * (variances + (means - mean).square())).sum(dim=0)
    return mean, var, count


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / std · weight + bias, where the statistics are functions of x.

    All passes over x are torch's own batch norm kernels: written as single operations they took
    five times as long (53 ms against 10 ms for [128, 32, 16, 16], one thread).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(_upcast(x), mean, var, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        x32, grad_y = _upcast(x), _upcast(grad_outputs[0])
        # Only the sums over this rank's batch: sum of grad_y · (x - mean) / std, and of grad_y.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x32, None, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        # The statistics feed every output of the group, so their gradients are sums over it.
        sums = torch.cat([grad_bias, grad_weight])  # [2C]
        dist.all_reduce(sums, group=ctx.group)
        through_mean, through_var = (sums / count).chunk(2)  # [C], [C]
        scale = torch.rsqrt(var + ctx.eps)
        scale = scale if weight is None else scale * weight
        # scale · (grad_y - through_mean - (x - mean) / std · through_var)
        rest = F.batch_norm(
            x32, mean, var, -scale * through_var, -scale * through_mean, eps=ctx.eps
        )
        grad_x = torch.addcmul(rest, grad_y, scale.view(1, -1, *[1] * (x.dim() - 2)))
        if weight is None:
            grad_weight = grad_bias = None
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


class _NormaliseOnGpu(torch.autograd.Function):
    """torch's synchronised batch norm, but for a forward pass that does not wait for the GPU.

    torch's leaves out the statistics of ranks without images, which takes three waits a norm:
    hundreds a step of ResNet-50. Here every rank has images; where all have the same number, it is
    not sent either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        count: _Count,
    ) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        num_channels = x.shape[1]
        mean, inverse_std = torch.batch_norm_stats(x, eps)  # [C], [C]
        local = torch.cat([mean, inverse_std, *([] if count.is_even else [count.values])])
        gathered = local.new_empty(dist.get_world_size(group) * len(local))
        dist.all_gather_into_tensor(gathered, local, group)
        per_rank = gathered.view(-1, len(local))  # [W, 2C] or, with the counts, [W, 2C + 1]
        means, inverse_stds, *sent = per_rank.split(num_channels, dim=1)
        counts = sent[0].flatten() if sent else count.values  # [W]
        int_counts = sent[0].flatten().int() if sent else count.integers
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, int_counts)
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return SyncBatchNorm.backward(ctx, *grad_outputs)  # its forward has as many arguments


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _upcast(x: Tensor) -> Tensor:
    return x.to(_statistics_dtype(x))
