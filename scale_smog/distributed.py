"""Rank facts and collectives, the differentiable all-reduce among them."""

import os
import resource
import sys
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog.errors import UserError

T = TypeVar("T")


def start(timeout_s: float = 1800) -> torch.device:
    """Joins the process group and returns this rank's device.

    Works alike under plain python (a group of one), torchrun, deepspeed and srun. CPU tensors
    travel through gloo, CUDA tensors through NCCL.
    """
    env = _rank_environment()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        device = torch.device("cuda", env["LOCAL_RANK"])
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Ranks of one machine share its cores; more threads than cores slow all of them down.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // env["LOCAL_WORLD_SIZE"]))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        store=dist.HashStore() if env["WORLD_SIZE"] == 1 else None,
        init_method="env://" if env["WORLD_SIZE"] > 1 else None,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if has_gpu else None,
    )
    return device


def _rank_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE from the launcher, or SLURM, or 0 of 1.

    deepspeed asks for them in the environment too, so they are put there.
    """
    slurm = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    }
    # Inside an allocation but outside srun SLURM_PROCID may be set for one task: not a launcher.
    under_slurm = "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ
    facts = {}
    for name, slurm_name in slurm.items():
        default = os.environ.get(slurm_name) if under_slurm else None
        facts[name] = os.environ.get(name) or default or ("1" if "WORLD" in name else "0")
    if facts["WORLD_SIZE"] != "1" and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set: start with torchrun or deepspeed")
    os.environ.update(facts)
    return {name: int(value) for name, value in facts.items()}


def stop() -> None:
    """Leaves the process group; a rank that just exits makes the others' shutdown noisy."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process() -> None:
    """Ends one of several ranks at once, its output flushed; call it after `stop`, last of all.

    DeepSpeed holds on to the process groups. Their threads then live on while the interpreter
    shuts down, and now and then abort it: a finished run would report a failure.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """Processes of this machine, as the launcher counted them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one rank that writes files and talks to the console."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks (on the CPU: no GPU work is synchronised)."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums `x` in place over the ranks of `group` and returns it. No gradient."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format))


def peak_memory_mib() -> float:
    """Most memory this process has held: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB


def differentiable_all_reduce(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, with the gradient of the sum of all ranks' losses.

    An engine that averages parameter gradients over ranks then has exactly the gradient of the
    mean loss, as if one rank had held the whole batch. Every rank must run forward and backward.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_object(value: T) -> T:
    """Rank 0's picklable `value` on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_columns(x: Tensor) -> Tensor:
    """Joins `x` of all ranks along dimension 1, in rank order; shapes may differ there only.

    Args:
        x: [S, B, ...] on the CPU or this rank's device.

    Returns:
        [S, sum of B, ...] on every rank.
    """
    if world_size() == 1:
        return x
    widths: list[int] = [0] * world_size()
    dist.all_gather_object(widths, x.shape[1])
    pieces = [x.new_empty(x.shape[0], width, *x.shape[2:]) for width in widths]
    dist.all_gather(pieces, x.contiguous())
    return torch.cat(pieces, dim=1)
