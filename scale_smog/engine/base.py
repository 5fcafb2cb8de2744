"""What the loop asks of an engine, and the part that all engines share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import EngineConfig, OptimizerConfig
from scale_smog.models import MomentumNet, OnlineNet
from scale_smog.optim import Shard, build_optimizer, set_rates

STATE_KEYS = {  # of torch's optimizers and of Lars, beside AdamW's step count
    "lars": ("momentum_buffer",),
    "sgd": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}  # of the weights


class Engine(ABC):
    """Two nets spread over the ranks, and the optimizer and momentum update on their shards.

    A subclass wraps the online net in `_prepare`, names the parts of the parameters that this rank
    updates in `_build_shards`, and runs `backward` and `step`. Weights, momentum net and optimizer
    state are float32 in every precision but fp64; bf16 is autocast.

    Args:
        online: trained net, on its device; rank 0's weights win.
        momentum: net that follows it.
        optimizer: the recipe's section.
        config: the recipe's section.
        batch: images of a rank at a step.
    """

    def __init__(
        self,
        online: OnlineNet,
        momentum: MomentumNet,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        batch: int,
    ):
        self.device = next(online.parameters()).device
        self.dtype = DTYPES[config.precision]
        self._is_bf16 = config.precision == "bf16"
        self.online = online.to(self.dtype).train()
        self.momentum = momentum.to(self.dtype).train()
        distributed.broadcast_module(self.online)
        distributed.broadcast_module(self.momentum)
        self._wrapped = self._prepare(batch)
        self._shards = self._build_shards()
        num_parameters = len(list(self.online.parameters()))
        self._optimizer = build_optimizer(optimizer, self._shards, num_parameters, self.norm_group)
        self._optimizer_name = optimizer.name
        self._num_steps = 0

    norm_group: dist.ProcessGroup | None = None  # ranks that share a layer's parts

    @abstractmethod
    def _prepare(self, batch: int) -> nn.Module:
        """Wraps the online net; what it returns is called in the forward pass."""

    @abstractmethod
    def _build_shards(self) -> list[Shard]:
        """The parts of the online parameters that this rank updates."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean over ranks of `loss`."""

    @abstractmethod
    def _step(self) -> None:
        """Runs the optimizer on the shards, shares the result, drops the gradients."""

    def shards(self) -> list[Shard]:
        """The parts of the online parameters that this rank updates, with their gradients."""
        return self._shards

    def forward_online(self, view: Tensor, small: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """z [B, D] of the large view and p [V, B, D] of all views, with their graph."""
        view, small = view.to(self.dtype), [crop.to(self.dtype) for crop in small]
        with self._autocast():
            return self._wrapped(view, small)

    @torch.no_grad()
    def forward_momentum(self, view: Tensor) -> Tensor:
        """z' [B, D] of the other large view."""
        with self._autocast():
            return self.momentum(view.to(self.dtype))

    @torch.no_grad()
    def embed(self, view: Tensor) -> Tensor:
        """Backbone features [B, F] float32 with the running statistics, for evaluation."""
        self.online.eval()
        with self._autocast():
            features = self.online.backbone(view.to(self.dtype))
        self.online.train()
        return features.float()

    @torch.no_grad()
    def project(self, view: Tensor) -> Tensor:
        """z [B, D] of centre crops, with the running statistics, for looking at groups."""
        self.online.eval()
        with self._autocast():
            z, _ = self.online(view.to(self.dtype))
        self.online.train()
        return z

    def step(self, lr: float, weight_decay: float) -> None:
        """One optimizer step with these rates."""
        set_rates(self._optimizer, lr, weight_decay)
        self._step()
        self._num_steps += 1

    @torch.no_grad()
    def ema(self, alpha: float) -> None:
        """Momentum parameters <- alpha x momentum + (1 - alpha) x online (SMoG section 3.3)."""
        momentum, online = self._parameter_pairs()
        torch._foreach_lerp_(momentum, online, 1 - alpha)

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Momentum net <- online net, statistics of the batch norms included."""
        momentum, online = self._parameter_pairs()
        torch._foreach_copy_(momentum, online)
        buffers = dict(self.online.named_buffers())
        for name, buffer in self.momentum.named_buffers():
            buffer.copy_(buffers[name])

    def full_state(self) -> dict[str, Tensor]:
        """Everything of the engine under names that know no engine; a collective.

        Returns:
            `online.*`, `momentum.*` (as in the nets' state dicts) and, on rank 0 alone where it is
            spread, `optimizer.<parameter>.<key>` with the parameter's full shape.
        """
        state = {f"online.{name}": x for name, x in self.online.state_dict().items()}
        state |= {f"momentum.{name}": x for name, x in self.momentum.state_dict().items()}
        return state | self._full_optimizer_state()

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `full_state`, from any engine and any number of ranks."""
        for prefix, net in (("online.", self.online), ("momentum.", self.momentum)):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            net.load_state_dict(own)
        self._num_steps = int(state["optimizer.num_steps"])
        for shard in self._shards:
            full = state[f"online.{shard.name}"]
            shard.value.data.copy_(_part(shard, full).view_as(shard.value))
            own: dict[str, Tensor] = {}
            for key in STATE_KEYS[self._optimizer_name]:
                full = state[f"optimizer.{shard.name}.{key}"]
                own[key] = _part(shard, full).to(shard.value).view_as(shard.value).clone()
            if self._optimizer_name == "adamw":
                own["step"] = torch.tensor(float(self._num_steps))
            self._optimizer.state[shard.value] = own
        self._after_load()

    def _after_load(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """For engines that keep a second copy of what shards hold."""

    def _full_optimizer_state(self) -> dict[str, Tensor]:
        """Every part put at its place in zeros, then summed over the ranks: exact."""
        full = {"optimizer.num_steps": torch.tensor(self._num_steps)}
        shards = {shard.name: shard for shard in self._shards}
        for name, parameter in self.online.named_parameters():
            for key in STATE_KEYS[self._optimizer_name]:
                value = torch.zeros(parameter.numel(), dtype=self.dtype, device=self.device)
                if name in shards and (own := self._optimizer.state[shards[name].value]):
                    _part(shards[name], value).copy_(own[key].flatten())
                if self.norm_group is not None:
                    distributed.all_reduce(value, self.norm_group)
                if self.norm_group is None or distributed.is_main():
                    full[f"optimizer.{name}.{key}"] = value.view(parameter.shape)
        return full

    def _parameter_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Momentum parameters and the online ones they follow, in the same order."""
        online = dict(self.online.named_parameters())
        pairs = [(x, online[name]) for name, x in self.momentum.named_parameters()]
        return [m.detach() for m, _ in pairs], [o.detach() for _, o in pairs]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16)


def is_excluded(name: str, parameter: Tensor) -> bool:
    """Biases and norms (BYOL, MoCo v3, Barlow Twins), and Swin's relative positions."""
    return parameter.dim() <= 1 or "relative_position_bias" in name


def _part(shard: Shard, full: Tensor) -> Tensor:
    """The shard's elements of a parameter's full values: a flat view."""
    return full.view(-1)[shard.start : shard.start + shard.value.numel()]
