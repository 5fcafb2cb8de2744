"""Whole nets on every rank, gradients averaged (torch DistributedDataParallel)."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scale_smog import distributed
from scale_smog.engine.base import Engine, is_excluded
from scale_smog.optim import Shard

# torch 2.15 has a new name for the flag and warns of the old one.
_FLAGS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _FLAGS else "broadcast_buffers"


class DdpEngine(Engine):
    """Every rank updates all parameters, all alike."""

    def _prepare(self, batch: int) -> nn.Module:
        if distributed.world_size() == 1:
            return self.online
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Batch norm keeps its own buffers equal, where its scope is global.
        keep_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(
            self.online, device_ids=device_ids, gradient_as_bucket_view=True, **keep_buffers
        )

    def _build_shards(self) -> list[Shard]:
        return [
            Shard(name, number, p, 0, is_excluded(name, p))
            for number, (name, p) in enumerate(self.online.named_parameters())
        ]

    def backward(self, loss: Tensor) -> None:
        """Backward pass; gradients are averaged over ranks while it runs."""
        loss.backward()

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
