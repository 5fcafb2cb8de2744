"""What a step must compute and move, counted operation by operation without allocating a tensor.

Operations are counted on the meta device: what torch would run, with the shapes it would have.
From them follow the floating-point operations (for MFU) and a roof: each operation takes at least
its arithmetic at the device's peak or its bytes at the memory's bandwidth, whichever is longer.
Convolutional nets are bound by the latter, so their MFU says little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scale_smog.config import DEFAULT_NETS, DataConfig, ModelConfig, NetPlan
from scale_smog.models import build_nets, sharding_units

VALUE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
CAST_BYTES = 6  # of a weight under autocast: read as float32, written as bf16


class Op(NamedTuple):
    """One operation: its arithmetic, and the bytes it reads and writes."""

    name: str
    flops: float
    bytes: float


class Ready(NamedTuple):
    """A parameter whose gradient is done after so many of the backward pass's operations."""

    numel: int
    num_ops: int


@dataclass(frozen=True)
class StepCost:
    """The operations of a step's passes through the nets, for B images of one rank."""

    online_forward: list[Op]
    momentum_forward: list[Op]
    backward: list[Op]
    ready: list[Ready]  # in the order in which gradients become ready
    norm_channels: list[int]  # of each batch norm of the online net, in the order of the pass
    momentum_norm_channels: list[int]
    num_units: int  # that FSDP gathers one by one

    def at_batch(self, batch: int, more: "StepCost", counted: tuple[int, int]) -> "StepCost":
        """The cost of another batch: everything is linear in it.

        Args:
            batch: wanted.
            more: the cost of a second batch.
            counted: this cost's batch and the second one's.
        """
        first, second = counted
        share = (batch - first) / (second - first)

        def at(ours: list[Op], theirs: list[Op]) -> list[Op]:
            return [
                Op(a.name, *(x + share * (y - x) for x, y in zip(a[1:], b[1:], strict=True)))
                for a, b in zip(ours, theirs, strict=True)
            ]

        return replace(
            self,
            online_forward=at(self.online_forward, more.online_forward),
            momentum_forward=at(self.momentum_forward, more.momentum_forward),
            backward=at(self.backward, more.backward),
        )

    @property
    def flops(self) -> float:
        """Of matrix products and convolutions, a multiplication and an addition counting two."""
        return sum(op.flops for op in self.ops)

    @property
    def ops(self) -> list[Op]:
        """All of them, in order."""
        return [*self.momentum_forward, *self.online_forward, *self.backward]


def roofline_s(
    ops: Sequence[Op], flops_per_s: float, bytes_per_s: float, folded: bool = False
) -> float:
    """The least time of operations that run one after the other.

    Args:
        ops: to run.
        flops_per_s: peak of the device in the step's precision.
        bytes_per_s: of its memory.
        folded: only matrix products, convolutions and norms count, and the rest is as if folded
            into their reading and writing: the roof that a fraction of is a goal. Else every
            operation reads and writes the memory, as in eager mode.
    """
    counted = [op for op in ops if op.flops or "norm" in op.name] if folded else ops
    return sum(max(op.flops / flops_per_s, op.bytes / bytes_per_s) for op in counted)


def count_step(
    model: ModelConfig,
    data: DataConfig,
    batch: int,
    precision: str,
    nets: NetPlan = DEFAULT_NETS,
) -> StepCost:
    """Counts one step of `batch` images on one rank: every pass through the two nets.

    The groups, the optimizer and the momentum update are not counted: they are bound by memory and
    launches, and are measured.
    """
    with torch.device("meta"):
        online, momentum = build_nets(model, nets)
        large = torch.empty(batch, 3, data.large_px, data.large_px)
        small = [torch.empty(batch, 3, data.small_px, data.small_px)] * data.num_small_crops
        others = [large] * (nets.num_online_views - 1) + small
    num_weights = sum(p.numel() for p in online.parameters())
    counter = OpCounter(VALUE_BYTES[precision])
    channels, momentum_channels = _NormChannels(online), _NormChannels(momentum)
    with counter, torch.no_grad():
        for _ in range(nets.num_momentum_views):
            momentum(large)
    momentum_forward = counter.take()
    with counter:
        z, p, _ = online(large, others)
    online_forward = counter.take()
    ready: list[Ready] = []
    for parameter in online.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda x: ready.append(Ready(x.numel(), len(counter.ops)))
        )
    with counter:
        (z.sum() + p.sum()).backward()
    backward = counter.take()
    if precision == "bf16":
        cast = Op("autocast", 0.0, CAST_BYTES * num_weights)
        online_forward.append(cast)
        momentum_forward.append(cast)
        backward.append(cast)
    return StepCost(
        online_forward,
        momentum_forward,
        backward,
        ready,
        norm_channels=channels.seen,
        momentum_norm_channels=momentum_channels.seen,
        num_units=len(sharding_units(online)),
    )


class _NormChannels:
    """Notes the channels of every batch norm that a forward pass goes through."""

    def __init__(self, net: torch.nn.Module):
        self.seen: list[int] = []
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(self._note)

    def _note(self, module: Any, _inputs: Any, _output: Any) -> None:
        self.seen.append(module.num_features)


class OpCounter(TorchDispatchMode):
    """Notes every operation that runs inside it.

    Args:
        value_bytes: of every value of every tensor, whatever its dtype: nets are counted in
            float32 and run in another precision.
    """

    def __init__(self, value_bytes: int):
        super().__init__()
        self.ops: list[Op] = []
        self._value_bytes = value_bytes

    def take(self) -> list[Op]:
        """What has been noted, and starts anew."""
        taken, self.ops = self.ops, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            reads, writes = (sum(x.numel() for x in xs) for xs in (inputs, outputs))
            if "batch_norm" in name:
                reads *= 2  # once for the statistics (or their gradients), once to apply them
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self.ops.append(Op(name, float(flops), float((reads + writes) * self._value_bytes)))
        return result


FREE = {  # no memory is touched
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "_unsafe_view", "lift_fresh", "_reshape_alias",
}  # fmt: skip
