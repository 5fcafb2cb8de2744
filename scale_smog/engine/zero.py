"""DeepSpeed ZeRO: every rank updates a partition of the parameters; only importer of deepspeed.

DeepSpeed hands its optimizer one flat tensor, so a LARS given to it would see one layer. Here its
optimizer is a callback that runs the engine's own over the parts of the parameters in that tensor.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import ZERO_BUCKET_NUMEL, NetName
from scale_smog.distributed import Partition
from scale_smog.engine.base import Engine
from scale_smog.errors import UserError
from scale_smog.optim import ParameterPartition


class ZeroEngine(Engine):
    """ZeRO stages 1 (optimizer state is split) and 2 (gradients too); the nets are whole."""

    def _prepare(self, micro_batch: int) -> tuple[nn.Module, nn.Module]:
        deepspeed = _import_deepspeed(self.device, self.config.kind)
        self.norm_group = dist.group.WORLD
        self._names = {p: name for name, p in self.online.named_parameters()}
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.online,
            optimizer=_Callback(list(self._names), self._run_optimizer),
            config=self._settings(micro_batch),
            dist_init_required=False,
        )
        return self._deepspeed, self.momentum

    def _settings(self, micro_batch: int) -> dict[str, Any]:
        own: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,  # `_micro_batch` says which backward pass is the last
            "gradient_clipping": 0.0,  # `_update` clips
            "communication_data_type": self.config.reduce_precision,
            "zero_allow_untested_optimizer": True,
        }
        zero = {
            "stage": int(self.config.kind.removeprefix("zero")),
            "reduce_bucket_size": ZERO_BUCKET_NUMEL,
            "allgather_bucket_size": ZERO_BUCKET_NUMEL,
        }
        further = self.config.deepspeed
        zero |= further.get("zero_optimization", {}) | self._zero_settings
        return further | own | {"zero_optimization": zero}

    _zero_settings: ClassVar = {"compute_grad_norm": False}  # else one more reduction

    def _parameter_partitions(self) -> list[ParameterPartition]:
        zero = self._deepspeed.optimizer
        self._in_flat: list[tuple[nn.Parameter, Tensor, int]] = []
        partitions = []
        for flat, group in zip(
            zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
        ):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else this rank holds nothing of the parameter
                    there = mapping.hp_fragment_address
                    start = mapping.lp_fragment_address.start
                    partitions.append(
                        self._in_flat_tensor(parameter, flat, there.start, there.numel, start)
                    )
        return partitions

    def _in_flat_tensor(
        self, parameter: nn.Parameter, flat: Tensor, offset: int, numel: int, start: int
    ) -> ParameterPartition:
        """The range of a parameter from `start` on, which lies in `flat` from `offset` on."""
        name = self._names[parameter]
        value = nn.Parameter(flat.detach()[offset : offset + numel])  # shares the memory of `flat`
        self._in_flat.append((value, flat, offset))
        info = self._parameters[name]
        return ParameterPartition(name, info.layer_id, value, start, info.is_excluded)

    def _run_optimizer(self) -> None:
        """Called by DeepSpeed inside `step`, when the flat tensors hold averaged gradients."""
        for value, flat, offset in self._in_flat:
            assert flat.grad is not None
            value.grad = flat.grad[offset : offset + value.numel()]
        self._update()

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[object]:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)

    def _step(self) -> None:
        self._deepspeed.step()


class Zero3Engine(ZeroEngine):
    """ZeRO stage 3: both nets are split too, and weights gathered layer by layer."""

    _zero_settings: ClassVar = {
        "sub_group_size": 10**12,  # the optimizer is called once a step
        "stage3_param_persistence_threshold": 0,  # else small weights miss the momentum update
        "memory_efficient_linear": False,  # it replaces torch's linear, and autocast misses it
        # Else weights are gathered on a stream that does not wait for the updates of the last step.
        "overlap_comm": False,
    }

    def _prepare(self, micro_batch: int) -> tuple[nn.Module, nn.Module]:
        online, _ = super()._prepare(micro_batch)
        self.net_group = dist.group.WORLD
        forget = self._forget_order
        self._first_passes = self.online.register_forward_pre_hook(forget, prepend=True)
        if not list(self.momentum.parameters()):  # the method has none
            return online, self.momentum
        settings = self._settings(micro_batch)
        momentum, *_ = _import_deepspeed(self.device, self.config.kind).initialize(
            model=self.momentum, config=settings, dist_init_required=False
        )
        return online, momentum

    def _forget_order(self, *_: object) -> None:
        """Of the layers in the pass before, until the first step is done.

        By the first order that it notes, DeepSpeed decides once which weights stay gathered from a
        forward pass to its backward pass. Micro-batches begin with passes that have none: every
        later backward pass would gather its weights anew, layer by layer.
        """
        coordinator = self._deepspeed.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def embed(self, view: Tensor, of: NetName = "online") -> Tensor:
        """As of all engines."""
        # DeepSpeed notes the order of the layers in a net's first pass, until the next pass of the
        # whole net; this one, of the backbone alone, would be taken for a part of the first, whose
        # weights then stay gathered and are never updated. The online net's pass back ends its own.
        if of == "momentum":
            momentum: Any = self._forward_momentum
            momentum.optimizer.get_param_coordinator().reset_step()
        return super().embed(view, of)

    def _partition(self, parameter: Any) -> Partition:
        numel, per_rank = parameter.ds_numel, parameter.ds_tensor.numel()
        start = min(distributed.rank() * per_rank, numel)
        # Behind the last value the tensor is filled up with garbage.
        values = parameter.ds_tensor.detach()[: min(per_rank, numel - start)]
        return Partition(values, start, parameter.ds_shape, is_replicated=False)

    def _parameter_partitions(self) -> list[ParameterPartition]:
        zero = self._deepspeed.optimizer
        self._in_flat = []
        partitions = []
        for parameter in (p for group in zero.fp16_groups for p in group):
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            held = self._partition(parameter)
            numel = held.values.numel()
            flat = zero.fp32_partitioned_groups_flat[group]
            if numel:  # small tensors leave the last ranks without an element
                partitions.append(self._in_flat_tensor(parameter, flat, offset, numel, held.start))
        return partitions

    def _step(self) -> None:
        super()._step()
        self._first_passes.remove()
        # DeepSpeed looks for itself, and leaves out the step on all ranks.
        self._is_applied = self._is_applied and self._deepspeed.was_step_applied()


class _Callback(torch.optim.Optimizer):
    """What DeepSpeed takes for an optimizer."""

    def __init__(self, parameters: list[nn.Parameter], run: Callable[[], None]):
        super().__init__(parameters, {"lr": 1.0})
        self._run = run

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._run()


def _import_deepspeed(device: torch.device, kind: str) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"engine.kind={kind} needs deepspeed ({error}); or take ddp") from None
    if device.type == "cpu":
        # Else it compiles an op for inference, a minute at the first start, whose buffers of 66 MiB
        # a rank stay in /dev/shm.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
