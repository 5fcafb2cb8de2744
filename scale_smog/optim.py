"""LARS, which parameters it leaves out, and every optimizer over what an engine's rank updates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.sgd import sgd

from scale_smog.config import OptimizerConfig
from scale_smog.distributed import all_reduce

STATE_KEYS = {  # of torch's optimizers and of Lars, beside AdamW's step count
    "lars": ("momentum_buffer",),
    "sgd": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
LARGE, RANGE = 2**16, 2**12  # values of a tensor


@dataclass(frozen=True)
class ParameterPartition:
    """What this rank updates of one online parameter: all of it, or a flat range."""

    name: str
    layer_id: int  # of the parameter, the same on all ranks
    value: nn.Parameter  # master weights, sharing memory with the engine's
    start: int  # of the range in the flattened parameter
    is_excluded: bool  # of `is_excluded`


def is_excluded(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has no weight decay and, under LARS, no trust ratio.

    Biases and norms, as in BYOL, MoCo v3 and Barlow Twins, and Swin's relative position biases; the
    paper does not say.
    """
    return parameter.dim() <= 1 or "relative_position_bias" in name


def layer_norms(
    tensors: Sequence[list[Tensor]],
    layer_ids: Tensor,
    num_layers: int,
    norm_group: dist.ProcessGroup | None,
    dtype: torch.dtype,
) -> Tensor:
    """Norms of whole layers, of which the ranks hold parts.

    With `norm_group` set, a collective. Nothing waits for the device.

    Args:
        tensors: k lists of n tensors each, for instance weights and gradients.
        layer_ids: of the n tensors [n] int64, on their device; those of a layer are summed.
        num_layers: L, over all ranks.
        norm_group: ranks that hold the other parts of the layers; None: layers are whole.
        dtype: of the tensors.

    Returns:
        [k, L].
    """
    squares = torch.zeros(len(tensors), num_layers, dtype=dtype, device=layer_ids.device)
    if tensors[0]:
        num = len(tensors[0])
        norms = torch.stack(_tensor_norms([x for each in tensors for x in each]))  # [k·n]
        squares.index_add_(1, layer_ids, norms.square_().view(-1, num))
    if norm_group is not None:
        all_reduce(squares, norm_group)
    return squares.sqrt_()


def _tensor_norms(tensors: list[Tensor]) -> tuple[Tensor, ...] | list[Tensor]:
    """Of each [], in its precision."""
    if not tensors[0].is_cpu:
        return torch._foreach_norm(tensors)
    # On a CPU torch sums up a whole tensor on one thread and in one number: of two million
    # float32 the fifth digit is wrong. So the norm of the norms of ranges.
    return torch._foreach_norm([x if x.numel() < LARGE else _range_norms(x) for x in tensors])


def _range_norms(x: Tensor) -> Tensor:
    """Norms of the parts of a tensor: ranges of its values, or its first dimension's slices."""
    if not x.is_contiguous():  # channels last: a convolution's weights
        return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))
    flat, num_whole = x.view(-1), x.numel() // RANGE * RANGE
    ranges = torch.linalg.vector_norm(flat[:num_whole].view(-1, RANGE), dim=1)
    return torch.cat([ranges, torch.linalg.vector_norm(flat[num_whole:]).view(1)])


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive SGD (You, Gitman, Ginsburg, arXiv:1708.03888).

    A layer's update is scaled by trust |w| / (|g| + weight_decay |w|).

    Args:
        params: tensors or param groups. A group may hold `use_trust_ratio` (False: plain momentum
            SGD).
        lr: learning rate.
        momentum: of the scaled gradient.
        weight_decay: L2.
        trust: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "use_trust_ratio": True})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Any = None, norms: Mapping[Tensor, tuple[float, float]] | None = None
    ) -> None:
        """One update from the tensors' `.grad`, which are overwritten on a GPU: no copies are made.

        Args:
            closure: not used.
            norms: |w| and |g| of the layer to which each tensor belongs, for callers who know them;
                by default tensors are whole layers, and to read their norms waits for the device.
        """
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = norms or _norms_of(held)
        for group in self.param_groups:
            values = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in values if p.grad is not None]
            if not values:
                continue
            if not group["use_trust_ratio"]:
                self._momentum_sgd(values, grads, group, group["weight_decay"])
                continue
            ratios = [self._trust_ratio(*norms[p], group) for p in values]
            if values[0].is_cpu and group["momentum"] > 0:
                # One pass over memory: with momentum, torch weighs gradient and decay together by
                # 1 - dampening.
                for value, grad, ratio in zip(values, grads, ratios, strict=True):
                    self._momentum_sgd([value], [grad], group, group["weight_decay"], 1.0 - ratio)
            else:  # three launches, not one a layer
                torch._foreach_add_(grads, values, alpha=group["weight_decay"])
                torch._foreach_mul_(grads, ratios)
                self._momentum_sgd(values, grads, group)

    def _momentum_sgd(
        self,
        values: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        weight_decay: float = 0.0,
        dampening: float = 0.0,
    ) -> None:
        """torch's fused SGD, which reads and writes each tensor once."""
        buffers: list[Tensor | None] = [self._buffer(p) for p in values]
        sgd(
            values,
            grads,
            buffers,
            fused=True,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=weight_decay,
            dampening=dampening,
            nesterov=False,
            maximize=False,
        )

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _trust_ratio(self, weight: float, gradient: float, group: dict[str, Any]) -> float:
        """Of a layer, from its norms; 1 where one is zero."""
        if weight == 0 or gradient == 0:
            return 1.0
        return group["trust"] * weight / (gradient + group["weight_decay"] * weight)


def _norms_of(values: list[Tensor]) -> dict[Tensor, tuple[float, float]]:
    """|w| and |g| of whole layers."""
    if not values:
        return {}
    weights, gradients = values, [p.grad for p in values if p.grad is not None]
    index = torch.arange(len(values), device=values[0].device)
    norms = layer_norms([weights, gradients], index, len(values), None, values[0].dtype)
    return dict(zip(values, zip(*norms.tolist(), strict=True), strict=True))


def build_optimizer(
    config: OptimizerConfig, partitions: list[ParameterPartition]
) -> torch.optim.Optimizer:
    """The recipe's optimizer over this rank's partitions, excluded parameters undecayed.

    `set_rates` gives it the learning rate and the weight decay of a step.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p.value for p in partitions if not p.is_excluded], "decays": True},
        {"params": [p.value for p in partitions if p.is_excluded], "decays": False},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, foreach=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, foreach=True)
    groups[1]["use_trust_ratio"] = False
    return Lars(groups, 0.0, config.momentum)


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float, norms: list[float]) -> list[float]:
    """Clips by the global gradient norm, as torch's `clip_grad_norm_` does for whole parameters.

    Args:
        gradients: what this rank holds of them.
        max_norm: to which longer ones are scaled.
        norms: of all layers, over all ranks.

    Returns:
        The layers' norms as they are now.
    """
    factor = min(1.0, max_norm / (math.hypot(*norms) + 1e-6))
    if gradients:  # small tensors leave some ranks without a row
        torch._foreach_mul_(gradients, factor)
    return [factor * norm for norm in norms]


@torch.no_grad()
def ema_update(means: list[Tensor], values: list[Tensor], weight: float) -> None:
    """Exponential moving means: means <- means + weight x (values - means), in place.

    Args:
        means: n tensors on one device.
        values: n tensors of the same shapes.
        weight: of the new values, 0 to 1.
    """
    if not means:  # of a rank that holds no row
        return
    pairs = zip(means, values, strict=True)
    if not all(x.is_cpu and _lie_alike(x, y) for x, y in pairs):
        torch._foreach_lerp_(means, values, weight)
        return
    # The same sum, below 1/2 to the bit, as a step of SGD by means - values: a decay of 1 less the
    # values. On a CPU lerp computes longer than memory needs for its values.
    sgd(
        means,
        values,
        [None] * len(means),
        fused=True,
        lr=weight,
        momentum=0.0,
        weight_decay=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=True,
    )


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of a shape have their values in the same order in memory."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets one step's learning rate and, where parameters decay, weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
