"""Rank facts and collectives, the differentiable all-reduce among them."""

import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog.errors import RankError, UserError
from scale_smog.meeting import meet

T = TypeVar("T")

FAILING_TOGETHER_S, POLL_S = 10.0, 0.1
_store: dist.Store | None = None  # in which the ranks have met


class Piece(NamedTuple):
    """What this rank holds of a tensor that knows no engine and no number of ranks."""

    values: Tensor  # any shape and layout; row by row they are a range of the flattened whole
    start: int  # of that range
    shape: torch.Size  # of the whole
    is_shared: bool  # every rank holds the same

    @classmethod
    def whole(cls, values: Tensor) -> Self:
        """A tensor that every rank holds."""
        return cls(values, 0, values.shape, is_shared=True)

    @classmethod
    def rows(cls, values: Tensor) -> Self:
        """This rank's rows [R, ...] of a tensor of as many rows on every rank, in rank order."""
        shape = torch.Size([len(values) * world_size(), *values.shape[1:]])
        return cls(values, rank() * values.numel(), shape, is_shared=False)


def start(timeout_s: float = 1800, meeting_s: float = 600) -> torch.device:
    """Joins the process group and returns this rank's device.

    Works alike under plain python (a group of one), torchrun, deepspeed and srun. CPU tensors
    travel through gloo, CUDA tensors through NCCL.

    Raises:
        UserError: ranks have not come within `meeting_s`, named; or more ranks than GPUs here.
    """
    env = _rank_environment()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        num_gpus = torch.cuda.device_count()
        if env["LOCAL_RANK"] >= num_gpus:
            raise RankError(f"local rank {env['LOCAL_RANK']} has no GPU: start {num_gpus} here")
        device = torch.device("cuda", env["LOCAL_RANK"])
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Ranks of one machine share its cores; more threads than cores slow all of them down.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // env["LOCAL_WORLD_SIZE"]))
    global _store
    _store = meet(env["RANK"], env["WORLD_SIZE"], meeting_s)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        store=_store,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if has_gpu else None,
    )
    return device


def _rank_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE from the launcher, or SLURM, or 0 of 1.

    deepspeed asks for them in the environment too, so they are put there.
    """
    others = {"LOCAL_WORLD_SIZE": os.environ.get("LOCAL_SIZE")}  # deepspeed's name for it
    # Inside an allocation but outside srun SLURM_PROCID may be set for one task: not a launcher.
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # as "8(x2)"
        others = {
            "RANK": os.environ.get("SLURM_PROCID"),
            "WORLD_SIZE": os.environ.get("SLURM_NTASKS"),
            "LOCAL_RANK": os.environ.get("SLURM_LOCALID"),
            "LOCAL_WORLD_SIZE": tasks.group() if tasks else None,
        }
    facts = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        default = "1" if "WORLD" in name else "0"
        facts[name] = os.environ.get(name) or others.get(name) or default
    if facts["WORLD_SIZE"] != "1" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start with torchrun, deepspeed or "
            "launcher/slurm.sbatch"
        )
    os.environ.update(facts)
    return {name: int(value) for name, value in facts.items()}


@contextmanager
def joined(meeting_s: float = 600) -> Iterator[torch.device]:
    """The process group from `start` to `stop`; gives this rank's device.

    A rank that fails alone does not wait for the others, who wait for it: NCCL leaves a group
    together. Its process ends, and with it the group.

    Raises:
        UserError: as `start`.
        RankError: in place of a UserError that only this rank has met.
    """
    device = start(meeting_s=meeting_s)
    try:
        yield device
    except BaseException as error:
        where = f"rank {rank()} on {socket.gethostname()}"
        may_be_everyones = isinstance(error, UserError) and not isinstance(error, RankError)
        is_everyones = may_be_everyones and _all_fail()
        if is_everyones or device.type == "cpu":
            stop()
        if may_be_everyones and not is_everyones:
            raise RankError(f"{where}: {error}") from error
        raise
    stop()


def _all_fail() -> bool:
    """Whether all ranks come here, soon after one another."""
    assert _store is not None
    end = time.monotonic() + FAILING_TOGETHER_S
    try:
        num_failed = _store.add("failed", 1)
        while num_failed < world_size():
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
            num_failed = _store.add("failed", 0)
        num_seen = _store.add("seen", 1)
        # Rank 0, whose store it is and who will say the error, goes when all have seen it, the
        # others after it: a launcher ends the rest with the first that ends.
        while is_main() and num_seen < world_size() and time.monotonic() < end + 10 * POLL_S:
            time.sleep(POLL_S)
            num_seen = _store.add("seen", 0)
    except RuntimeError:  # rank 0 is gone, and the store with it
        return False
    if not is_main():
        time.sleep(10 * POLL_S)
    return True


def stop() -> None:
    """Leaves the process group; a rank that just exits makes the others' shutdown noisy."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None  # rank 0's port is free again


def end_process(status: int = 0) -> None:
    """Ends one of several ranks at once, its output flushed; call it after `stop`, last of all.

    DeepSpeed holds on to the process groups. Their threads then live on while the interpreter
    shuts down, and now and then abort it: a finished run would report a failure.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)


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


def differentiable_gather(x: Tensor) -> Tensor:
    """`x` of all ranks [W, ...], in rank order; gradients as of `differentiable_all_reduce`."""
    if world_size() == 1:
        return x[None]
    own = torch.arange(world_size(), device=x.device) == rank()
    return differentiable_all_reduce(own.view(-1, *[1] * x.dim()) * x)  # one rank's x, and zeros


def background_group() -> dist.ProcessGroup | None:
    """All ranks once more, on the CPU, for a thread that talks beside the training; else None."""
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


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


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank."""
    everyone = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value, group=group)
    return everyone


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls a function on every rank; what it returned there, in rank order; a collective.

    Raises:
        OSError: on every rank, if it did so on one; with the rank's name.
        UserError: likewise.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = function(), None
    except UserError as error:
        outcome = None, error
    except OSError as error:
        outcome = None, OSError(_where(error))
    outcomes = gather_objects(outcome, group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]  # pyright: ignore[reportReturnType]


def _where(error: OSError) -> str:
    where = f"rank {rank()} on {socket.gethostname()}: " if world_size() > 1 else ""
    words = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return where + (words or str(error))


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
