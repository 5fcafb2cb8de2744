"""Whole nets on every rank, gradients averaged (torch DistributedDataParallel)."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

from scale_smog import distributed
from scale_smog.engine.base import Engine
from scale_smog.optim import ParameterPartition

# torch 2.15 has a new name for the flag and warns of the old one.
_FLAGS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _FLAGS else "broadcast_buffers"


class DdpEngine(Engine):
    """Every rank updates all parameters, all alike."""

    def _prepare(self, micro_batch: int) -> tuple[nn.Module, nn.Module]:
        if self.device.type == "cuda":
            # This engine alone keeps its tensors as they are, so weights may lie as convolutions
            # like them; ZeRO and FSDP2 refuse all but contiguous ones. On a CPU the momentum update
            # of such weights takes 18 times as long.
            for net in (self.online, self.momentum):
                net.to(memory_format=torch.channels_last)
        for net in (self.online, self.momentum):
            match_gradient_strides(net)
        if distributed.world_size() == 1:
            return self.online, self.momentum
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Batch norm keeps its own buffers equal, where its scope is global.
        keep_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        wrapped = DistributedDataParallel(
            self.online, device_ids=device_ids, gradient_as_bucket_view=True, **keep_buffers
        )
        # Without a hook DDP divides every gradient by itself, not a bucket at once.
        is_bf16 = self.config.reduce_precision == "bf16"
        wrapped.register_comm_hook(None, bf16_compress_hook if is_bf16 else allreduce_hook)
        self._keeps_gradients = True  # in DDP's buckets
        return wrapped, self.momentum

    def _parameter_partitions(self) -> list[ParameterPartition]:
        return [
            ParameterPartition(name, info.layer_id, p, 0, info.is_excluded)
            for (name, p), info in zip(
                self.online.named_parameters(), self._parameters.values(), strict=True
            )
        ]

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self._forward_online, DistributedDataParallel):
            return nullcontext()
        return self._forward_online.no_sync()

    def _step(self) -> None:
        self._update()


def match_gradient_strides(net: nn.Module) -> None:
    """Gives the weights of 1x1 convolutions the strides that their gradients have.

    The bytes stay where they are. DDP takes its buckets' strides from the weights, and would copy
    on a CPU; on a GPU tensors of other strides are copied one by one.
    """
    for p in net.parameters():
        if p.dim() == 4 and p.shape[2:] == (1, 1):
            p.data = p.data.as_strided(p.shape, (p.shape[1], 1, p.shape[1], p.shape[1]))
