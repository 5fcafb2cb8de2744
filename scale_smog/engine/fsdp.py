"""FSDP2 and HSDP: weights, gradients and optimizer state split row by row, a stage at a time.

Weights stay float32 in both nets and bf16 is autocast, as in all engines. FSDP2's own bf16 policy
would round the batch norms' weights too, and send momentum weights of which bf16 loses the updates.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from scale_smog import distributed
from scale_smog.distributed import Partition
from scale_smog.engine.base import Engine
from scale_smog.errors import UserError
from scale_smog.models import MomentumNet, OnlineNet, sharding_units
from scale_smog.optim import ParameterPartition


class FsdpEngine(Engine):
    """`fsdp` splits over all ranks; `hsdp` over those of a node, and every node holds a copy."""

    def _prepare(self, micro_batch: int) -> tuple[nn.Module, nn.Module]:
        mesh = self._mesh()
        shard_mesh = mesh["shard"]
        self._rank, self._num_ranks = shard_mesh.get_local_rank(), shard_mesh.size()
        self.norm_group = self.net_group = shard_mesh.get_group()
        is_bf16 = self.config.reduce_precision == "bf16"
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if is_bf16 else None)
        for net in (self.online, self.momentum):
            self._shard(net, mesh, policy)
            # Evaluation calls a part of the net; through the root, so that it finds its weights.
            register_fsdp_forward_method(net, "features")
        return self.online, self.momentum

    def _mesh(self) -> DeviceMesh:
        world_size, kind = distributed.world_size(), self.device.type
        if self.config.kind == "fsdp":
            return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
        per_node = distributed.ranks_per_node()
        if world_size % per_node:
            raise UserError(
                f"engine.kind=hsdp: {world_size} ranks are no whole nodes of {per_node}; take fsdp"
            )
        shape = (world_size // per_node, per_node)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # whose own is torch's, whatever the run's
            backend = group._get_backend(self.device)
            if hasattr(backend, "_set_default_timeout"):  # not on simulated ranks
                backend._set_default_timeout(distributed.collective_timeout())
        return mesh

    def _shard(
        self, net: OnlineNet | MomentumNet, mesh: DeviceMesh, policy: MixedPrecisionPolicy
    ) -> None:
        # Every parameter belongs to a unit, none to the root, which would keep its own after a
        # forward pass without backward: the momentum update needs them split again.
        for module in [*sharding_units(net), net]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)

    def _partition(self, parameter: Tensor) -> Partition:
        assert isinstance(parameter, DTensor)
        rows = parameter.shape[0]
        row_numel = parameter.numel() // rows
        first_row = min(self._rank * -(-rows // self._num_ranks), rows)
        local = parameter.to_local().detach().view(-1)
        return Partition(local, first_row * row_numel, parameter.shape, is_replicated=False)

    def _parameter_partitions(self) -> list[ParameterPartition]:
        self._dtensors = dict(self.online.named_parameters())
        held = {name: self._partition(p) for name, p in self._dtensors.items()}
        return [
            ParameterPartition(
                name,
                self._parameters[name].layer_id,
                nn.Parameter(partition.values),  # shares the memory of the DTensor
                partition.start,
                self._parameters[name].is_excluded,
            )
            for name, partition in held.items()
            if partition.values.numel()  # small tensors leave the last ranks without a row
        ]

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.online, FSDPModule)
        self.online.set_requires_gradient_sync(is_last)
        return nullcontext()

    def _step(self) -> None:
        for part in self.partitions:
            grad = self._dtensors[part.name].grad
            assert isinstance(grad, DTensor)
            part.value.grad = grad.to_local().view(-1)
        self._update()
        for parameter in self._dtensors.values():
            parameter.grad = None
