"""LARS, which parameters it leaves out, and every optimizer over what an engine's rank updates."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.sgd import sgd

from scale_smog.config import OptimizerConfig
from scale_smog.distributed import all_reduce


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


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive SGD (You, Gitman, Ginsburg, arXiv:1708.03888).

    A layer's update is scaled by trust |w| / (|g| + weight_decay |w|). Parameters may be parts of
    layers: then `layer_ids` tells which of them belong together, and the norms are summed over
    ranks in one all-reduce. Nothing waits for the device.

    Args:
        params: tensors or param groups. A group may hold `use_trust_ratio` (False: plain momentum
            SGD) and `layer_ids`, the layer of each tensor, [n] int64 on their device.
        lr: learning rate.
        momentum: of the scaled gradient.
        weight_decay: L2.
        trust: trust coefficient.
        num_layers: layers over all ranks; needed with `layer_ids`.
        norm_group: ranks that hold the other parts of the layers; None: layers are whole.
        device: of the norms where this rank holds no part; default: the CPU.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        *,
        num_layers: int = 0,
        norm_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "use_trust_ratio": True, "layer_ids": None})
        # A rank that holds nothing of any layer still joins the reduction of the norms.
        held = [p for group in self.param_groups for p in group["params"]]
        self._like = held[0].detach() if held else torch.zeros((), device=device)
        self.num_layers = num_layers
        self.norm_group = norm_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update from the tensors' `.grad`, which are overwritten on a GPU: no copies are made.

        With `norm_group` set, a collective.
        """
        for group in self.param_groups:
            values = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in values if p.grad is not None]
            ratios = self._trust_ratios(values, grads, group) if group["use_trust_ratio"] else []
            if not values:  # this rank holds nothing; it has joined the reduction above
                continue
            if not ratios:
                self._momentum_sgd(values, grads, group, group["weight_decay"])
            elif self._like.is_cpu and group["momentum"] > 0:
                # One pass over memory: with momentum, torch weighs gradient and decay together by
                # 1 - dampening. On a GPU, to read a ratio would be to wait for it.
                for value, grad, ratio in zip(values, grads, ratios, strict=True):
                    self._momentum_sgd(
                        [value], [grad], group, group["weight_decay"], 1.0 - ratio.item()
                    )
            else:
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

    def _trust_ratios(
        self, values: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """One 0-d tensor a value, 1 where a norm is zero."""
        index = group["layer_ids"]
        num_layers = self.num_layers if index is not None else len(values)
        if num_layers == 0:
            return []
        if index is None:
            index = torch.arange(num_layers, device=self._like.device)
        norms = self._like.new_zeros(2, num_layers)  # of w and g
        if values:
            norms[0].index_add_(0, index, torch.stack(torch._foreach_norm(values)).square())
            norms[1].index_add_(0, index, torch.stack(torch._foreach_norm(grads)).square())
        if self.norm_group is not None:
            all_reduce(norms, self.norm_group)
        w, g = norms.sqrt_()
        ratio = group["trust"] * w / (g + group["weight_decay"] * w)
        ratio = torch.where((w > 0) & (g > 0), ratio, torch.ones_like(ratio))
        return list(ratio[index].unbind()) if values else []


def build_optimizer(
    config: OptimizerConfig,
    partitions: list[ParameterPartition],
    num_parameters: int,
    norm_group: dist.ProcessGroup | None,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The recipe's optimizer over this rank's partitions, excluded parameters undecayed.

    `set_rates` gives it the learning rate and the weight decay of a step.

    Args:
        config: the recipe's section.
        partitions: what this rank updates.
        num_parameters: of the whole net, the same on all ranks.
        norm_group: ranks that hold the other parts of the parameters; None: partitions are whole.
        device: of the values, also of a rank that holds none: its norms meet those of the others.
    """
    decayed = [p for p in partitions if not p.is_excluded]
    excluded = [p for p in partitions if p.is_excluded]
    groups: list[dict[str, Any]] = [
        {"params": [p.value for p in decayed], "decays": True},
        {"params": [p.value for p in excluded], "decays": False},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, foreach=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, foreach=True)
    layer_ids = [p.layer_id for p in decayed]
    groups[0]["layer_ids"] = torch.tensor(layer_ids, dtype=torch.long, device=device)
    groups[1]["use_trust_ratio"] = False
    options = {"num_layers": num_parameters, "norm_group": norm_group, "device": device}
    return Lars(groups, 0.0, config.momentum, **options)


@torch.no_grad()
def clip_gradients(
    partitions: list[ParameterPartition],
    max_norm: float,
    norm_group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Clips by the global gradient norm, as torch's `clip_grad_norm_` does for whole parameters.

    With `norm_group` set, a collective: one number is summed over the ranks that hold other parts.
    """
    grads = [p.value.grad for p in partitions if p.value.grad is not None]
    square = torch.zeros((), device=device)
    if grads:
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
    if norm_group is not None:
        all_reduce(square, norm_group)
    torch._foreach_mul_(grads, (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets one step's learning rate and, where parameters decay, weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
