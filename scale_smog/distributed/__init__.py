"""The ranks: who they are, how they meet, and what they tell one another."""

from scale_smog.distributed.collectives import (
    all_reduce,
    barrier,
    broadcast_module,
    broadcast_object,
    call_on_all_ranks,
    call_on_main,
    differentiable_all_gather,
    differentiable_all_reduce,
    gather_columns,
    gather_objects,
)
from scale_smog.distributed.partition import Partition
from scale_smog.distributed.process_group import (
    background_group,
    collective_timeout,
    destroy_process_group,
    end_process,
    init_process_group,
    is_main,
    num_sharing_ranks,
    peak_memory_mib,
    process_group,
    rank,
    rank_and_host,
    ranks_per_node,
    world_size,
)
from scale_smog.distributed.rendezvous import leave_rendezvous

__all__ = [
    "Partition",
    "all_reduce",
    "background_group",
    "barrier",
    "broadcast_module",
    "broadcast_object",
    "call_on_all_ranks",
    "call_on_main",
    "collective_timeout",
    "destroy_process_group",
    "differentiable_all_gather",
    "differentiable_all_reduce",
    "end_process",
    "gather_columns",
    "gather_objects",
    "init_process_group",
    "is_main",
    "leave_rendezvous",
    "num_sharing_ranks",
    "peak_memory_mib",
    "process_group",
    "rank",
    "rank_and_host",
    "ranks_per_node",
    "world_size",
]
