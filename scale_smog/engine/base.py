"""What the loop asks of an engine, and the part that all engines share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import EngineConfig, NetName, OptimizerConfig
from scale_smog.distributed import Partition
from scale_smog.engine.buffer_snapshot import BufferSnapshot
from scale_smog.engine.cast_weights import CastWeights
from scale_smog.engine.graphed import GraphedForward
from scale_smog.engine.side_stream import SideStream
from scale_smog.engine.stages import prepare_stages
from scale_smog.errors import UserError
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    average_running_stats,
    draw_factors,
    frozen_running_stats,
    unsynchronised_running_stats,
)
from scale_smog.optim import (
    STATE_KEYS,
    Lars,
    ParameterPartition,
    build_optimizer,
    clip_gradients,
    ema_update,
    is_excluded,
    layer_norms,
    set_rates,
)
from scale_smog.runtime import phases

# Shapes: B images per rank, D feature size, V views of the online net, L branches with drop path.

DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}  # of the weights


class ParameterInfo(NamedTuple):
    """What is known of a parameter of the online net before an engine takes it apart."""

    layer_id: int
    shape: torch.Size
    is_excluded: bool  # no weight decay, no trust ratio


class MicroBatch(NamedTuple):
    """What passes through the online net at once."""

    view: Tensor  # [b, 3, H, W]
    others: list[Tensor]  # each [b, 3, h, w]
    factors: Tensor | None  # of drop path [L, V, b]


class Engine(ABC):
    """Two nets spread over the ranks, the optimizer and the momentum update on what each holds.

    A subclass wraps the nets in `_prepare`, says what this rank updates of the parameters in
    `_parameter_partitions` and what it holds of one in `_partition`, and runs `_backward` and
    `_step`.
    Weights, momentum net and optimizer state are float32 in every precision but fp64; bf16 is
    autocast.

    With `accumulate` = n the images of a rank pass through the nets in n micro-batches, so that
    activations of only one are held. Batch norm sees one micro-batch at a time, of all ranks of
    its scope. Everything else is as without: groups, bank, loss and gradient are those of the whole
    batch. To that end the online net computes twice, first z and p of all micro-batches, then,
    from the gradient of the loss with respect to them, each micro-batch's gradients (Gao et al.,
    arXiv:2101.06983): a quarter more time.

    Args:
        online: trained net, on its device; rank 0's weights win.
        momentum: net that follows it.
        optimizer: the recipe's section.
        config: the recipe's section.
        batch: images of a rank at a step.
        seed: of the run, for drop path.

    Raises:
        UserError: the batch does not split into the micro-batches.
    """

    norm_group: dist.ProcessGroup | None = None  # ranks that each update a part of a parameter
    features: Tensor  # [B, F]: the backbone's, of the last `forward_online`, without gradient
    net_group: dist.ProcessGroup | None = None  # ranks that each hold a part; None: all of it
    _cast_weights: CastWeights | None = None  # of the online net
    _keeps_gradients = False  # parameters' `.grad` are the same tensors at every step

    def __init__(
        self,
        online: OnlineNet,
        momentum: MomentumNet,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        batch: int,
        seed: int = 0,
    ):
        if batch % config.accumulate:
            raise UserError(
                f"engine.accumulate={config.accumulate} does not split the {batch} images of a rank"
            )
        self._seed, self._batch = seed, batch
        self.device = next(online.parameters()).device
        self.dtype = DTYPES[config.precision]
        self.config = config
        if config.precision == "fp32":  # else a GPU's convolutions keep ten bits of the fraction
            torch.backends.cudnn.allow_tf32 = False
        self.online = online.to(self.dtype).train()
        self.momentum = momentum.to(self.dtype).train()
        for net in (self.online, self.momentum):
            distributed.broadcast_module(net)
        self._unshared = unsynchronised_running_stats([self.online, self.momentum])
        self._parameters = {
            name: ParameterInfo(layer_id, p.shape, is_excluded(name, p))
            for layer_id, (name, p) in enumerate(self.online.named_parameters())
        }
        prepare_stages(self.online, self.momentum, config)
        if config.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
            for net in (self.online, self.momentum):
                # Inside the nets: DeepSpeed turns off an autocast that it is called in.
                net.forward = autocast(net.forward)
                net.features = autocast(net.features)
        self._forward_online, self._forward_momentum = self._prepare(batch // config.accumulate)
        if config.precision == "bf16" and self.net_group is None and not config.compile:
            self._cast_weights = CastWeights(self.online, self._keeps_gradients)
            CastWeights(self.momentum)
        self.partitions = self._parameter_partitions()
        self._layer_ids = torch.tensor(  # [n]
            [p.layer_id for p in self.partitions], dtype=torch.long, device=self.device
        )
        self._optimizer = build_optimizer(optimizer, self.partitions)
        self._optimizer_config = optimizer
        self._num_steps = 0
        self._is_applied = True
        self._finite_if: list[Tensor] = []  # of a step's passes, [] each: finite if they were
        self._buffers = BufferSnapshot([self.online, self.momentum])
        # Engines that split the nets have streams of their own, which gather the weights.
        self._momentum_stream = SideStream(self.device if self.net_group is None else None)
        if config.cuda_graphs:
            if self.device.type != "cuda":
                raise UserError("engine.cuda_graphs=true needs a GPU")
            self._forward_momentum = GraphedForward(self._forward_momentum)
        self._pending: tuple[list[MicroBatch], Tensor, Tensor] | None = None

    @abstractmethod
    def _prepare(self, micro_batch: int) -> tuple[nn.Module, nn.Module]:
        """Wraps online and momentum net; what it returns is called in the forward passes."""

    @abstractmethod
    def _parameter_partitions(self) -> list[ParameterPartition]:
        """What this rank updates of the online parameters."""

    def _partition(self, parameter: Tensor) -> Partition:
        """What this rank holds of a parameter of a net."""
        return Partition.replicated(parameter.detach())

    @abstractmethod
    def _micro_batch(self, is_last: bool) -> AbstractContextManager[object]:
        """Around forward and backward pass of a micro-batch: ranks share gradients in the last."""

    def _backward(self, loss: Tensor) -> None:
        """Adds gradients of the mean over ranks of `loss`."""
        loss.backward()

    @abstractmethod
    def _step(self) -> None:
        """Has `_update` run where the partitions' gradients are, and shares the result."""

    def forward_online(self, view: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """z [B, D] of the first view and p [V, B, D] of it and the others, with their graph.

        Drop path is at work in passes that are trained: those with gradients.
        """
        factors = None
        if torch.is_grad_enabled():
            self._buffers.take()
            self._momentum_stream.may_start_now()
            factors = self._drop_factors(num_views=1 + len(others))
        micro_batches = self._split(view, others, factors)
        if len(micro_batches) == 1:
            z, p, self.features = self._forward_online(*micro_batches[0])
            return z, p
        with torch.no_grad():
            outputs = [self._forward_online(*x) for x in micro_batches]
        zs, ps, features = zip(*outputs, strict=True)  # each [b, D], [V, b, D], [b, F]
        z, p, self.features = torch.cat(zs), torch.cat(ps, dim=1), torch.cat(features)
        if torch.is_grad_enabled():
            self._pending = micro_batches, z.requires_grad_(), p.requires_grad_()
        return z, p

    @torch.no_grad()
    def forward_momentum(self, view: Tensor) -> Tensor:
        """z' [B, D] of the other large view.

        Its kernels run beside those of the `forward_online` just called, so that batch norms of one
        net wait for other ranks while the other net computes.
        """
        with self._momentum_stream.running():
            z = torch.cat([self._forward_momentum(x.view) for x in self._split(view)])
            self._finite_if.append(z.sum())  # no gradient will tell
        return z

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean over ranks of `loss`, averaged over ranks while it runs."""
        self._finite_if.append(loss.detach())
        if self._pending is None:
            self._backward(loss)
            return
        micro_batches, z, p = self._pending
        self._pending = None
        loss.backward()  # as far as z and p
        assert p.grad is not None
        grad_z = torch.zeros_like(z) if z.grad is None else z.grad  # None: detached groups
        grads_z, grads_p = (
            grad_z.chunk(len(micro_batches)),
            p.grad.chunk(len(micro_batches), dim=1),
        )
        for i, micro_batch in enumerate(micro_batches):
            with self._micro_batch(is_last=i == len(micro_batches) - 1):
                with frozen_running_stats(self.online):
                    z, p, _ = self._forward_online(*micro_batch)  # [b, D], [V, b, D]
                self._backward((z * grads_z[i]).sum() + (p * grads_p[i]).sum())

    def step(self, lr: float, weight_decay: float) -> bool:
        """One optimizer step with these rates; a collective.

        Returns:
            False, on all ranks, if z', the loss or a gradient of any is not finite: then nothing
            has changed since before the forward passes.
        """
        set_rates(self._optimizer, lr, weight_decay)
        self._is_applied = True
        self._step()
        self._finite_if.clear()
        if not self._is_applied:
            self._buffers.restore()
            return False
        self._num_steps += 1
        average_running_stats(self._unshared)
        return True

    @torch.no_grad()
    def whole_parameter(self, name: str) -> Tensor:
        """A parameter of the online net, whole, on every rank; a collective where it is split."""
        held = self._partition(dict(self.online.named_parameters())[name])
        if held.is_replicated:
            return held.values
        whole = held.values.new_zeros(held.shape.numel())
        whole[held.start : held.start + held.values.numel()] = held.values.flatten()
        return distributed.all_reduce(whole, self.net_group).view(held.shape)

    @torch.no_grad()
    def update_ema(self, alpha: float) -> None:
        """Momentum parameters <- alpha x momentum + (1 - alpha) x online (SMoG section 3.3)."""
        momentum, online = self._parameter_pairs
        ema_update(momentum, online, 1 - alpha)

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Momentum net <- online net, statistics of the batch norms included."""
        momentum, online = self._parameter_pairs
        torch._foreach_copy_(momentum, online)
        buffers = dict(self.online.named_buffers())
        for name, buffer in self.momentum.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def embed(self, view: Tensor, of: NetName = "online") -> Tensor:
        """Backbone features [B, F] float32 with the running statistics; a collective."""
        net = self.online if of == "online" else self.momentum
        net.eval()
        features = net.features(view.to(self.dtype))
        net.train()
        return features.float()

    @torch.no_grad()
    def project(self, view: Tensor) -> Tensor:
        """z [B, D] of centre crops, with the running statistics; a collective."""
        self.online.eval()
        z, _, _ = self.online(view.to(self.dtype))
        self.online.train()
        return z

    def state_dict(self) -> dict[str, Partition]:
        """What this rank holds of everything of the engine, under names that know no engine.

        `online.*` and `momentum.*` as in the nets' state dicts, and `optimizer.<parameter>.<key>`.
        """
        state = {"optimizer.num_steps": Partition.replicated(torch.tensor(self._num_steps))}
        for prefix, net in (("online", self.online), ("momentum", self.momentum)):
            state |= {f"{prefix}.{k}": Partition.replicated(x) for k, x in net.named_buffers()}
            state |= {f"{prefix}.{k}": self._partition(x) for k, x in net.named_parameters()}
        is_replicated = self.norm_group is None
        for part in self.partitions:
            own, shape = self._optimizer.state[part.value], self._parameters[part.name].shape
            for key in self._state_keys:  # zeros before the first step
                values = own[key].detach() if own else torch.zeros_like(part.value).detach()
                name = f"optimizer.{part.name}.{key}"
                state[name] = Partition(values, part.start, shape, is_replicated)
        return state

    @torch.no_grad()
    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Takes this rank's values of `state_dict`, saved by any engine on any number of ranks."""
        self._num_steps = int(values["optimizer.num_steps"])
        for name, partition in self.state_dict().items():
            if not name.startswith("optimizer."):
                partition.values.copy_(values[name])
        parameters = dict(self.online.named_parameters())
        for part in self.partitions:
            held = self._partition(parameters[part.name])
            offset = part.start - held.start  # a master copy may be a range of what is held
            source = held.values.reshape(-1)[offset:]
            if source.data_ptr() != part.value.data_ptr():  # else the copy above has set it
                part.value.copy_(_view_as(source, part.value))
            own: dict[str, Tensor] = {}
            for key in self._state_keys:
                saved = values[f"optimizer.{part.name}.{key}"]
                own[key] = torch.empty_like(part.value).copy_(saved)
            if self._optimizer_config.name == "adamw":
                own["step"] = torch.tensor(float(self._num_steps))
            self._optimizer.state[part.value] = own

    def _update(self) -> None:
        """Runs the optimizer on the partitions, whose gradients are there and not needed again."""
        values: list[Tensor] = [p.value for p in self.partitions]
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        grads = [zero if p.grad is None else p.grad for p in values]
        is_lars = isinstance(self._optimizer, Lars)
        norms = layer_norms(  # [1 or 2, L]
            [grads, values] if is_lars else [grads],
            self._layer_ids,
            len(self._parameters),
            self.norm_group,
            self.dtype,
        )
        self._is_applied, (grad_norms, *weight_norms) = self._agree_on_step(norms)
        if self._is_applied:
            if self._optimizer_config.clip_norm:
                max_norm = self._optimizer_config.clip_norm
                grad_norms = clip_gradients(grads, max_norm, grad_norms)
            if isinstance(self._optimizer, Lars):
                of_layers = list(zip(*weight_norms, grad_norms, strict=True))
                layer_ids = [p.layer_id for p in self.partitions]
                of_values = zip(values, (of_layers[i] for i in layer_ids), strict=True)
                self._optimizer.step(norms=dict(of_values))
            else:
                self._optimizer.step()
        if self._cast_weights is not None and self._keeps_gradients:
            self._cast_weights.new_step()
        else:
            self._optimizer.zero_grad(set_to_none=True)

    def _agree_on_step(self, norms: Tensor) -> tuple[bool, list[list[float]]]:
        """Whether every rank's z', loss and gradients are finite, and the norms, on the host.

        The one place where a step waits; the ranks' requests for a stop travel along.

        Args:
            norms: of the layers [k, L], gradients' first.
        """
        total = torch.stack([*self._finite_if, norms[0].sum()]).sum()
        requested = total.new_full((), float(phases.is_stop_requested))
        sums = distributed.all_reduce(torch.stack([total, requested]))  # [2]
        total_of_all, num_requests, *read = torch.cat([sums, norms.flatten()]).tolist()
        phases.note_stop_requests(num_requests)
        num_layers = norms.shape[1]
        rows = [read[i : i + num_layers] for i in range(0, len(read), num_layers)]
        return math.isfinite(total_of_all), rows

    def _drop_factors(self, num_views: int) -> Tensor | None:
        """Of drop path at this step [L, V, B]; None: the net has none."""
        if not self.online.drop_paths:
            return None
        rates = [path.rate for path in self.online.drop_paths]
        first = distributed.rank() * self._batch
        images = range(first, first + self._batch)
        factors = draw_factors(rates, self._seed, self._num_steps, images, num_views)
        if self.device.type == "cuda":
            factors = factors.pin_memory()  # the host does not wait for the copy
        return factors.to(self.device, self.dtype, non_blocking=True)

    def _split(
        self, view: Tensor, others: Sequence[Tensor] = (), factors: Tensor | None = None
    ) -> list[MicroBatch]:
        """The views in micro-batches, in the nets' precision and the convolutions' layout."""
        num = self.config.accumulate
        views = [
            x.to(self.dtype, memory_format=torch.channels_last).chunk(num) for x in (view, *others)
        ]
        of_images = [None] * num if factors is None else factors.chunk(num, dim=2)
        return [
            MicroBatch(first, list(more), own)
            for first, *more, own in zip(*views, of_images, strict=True)
        ]

    @property
    def _state_keys(self) -> tuple[str, ...]:
        return STATE_KEYS[self._optimizer_config.name]

    @cached_property
    def _parameter_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Momentum parameters and the online ones they follow, in the same order.

        What a rank holds of them stays where it is from the first step on.
        """
        online = dict(self.online.named_parameters())
        pairs = [
            (self._partition(x).values, self._partition(online[name]).values)
            for name, x in self.momentum.named_parameters()
        ]
        return [m for m, _ in pairs], [o for _, o in pairs]


def _view_as(flat: Tensor, like: Tensor) -> Tensor:
    """The first elements of a flat tensor, in the shape of another."""
    return flat[: like.numel()].view(like.shape)
