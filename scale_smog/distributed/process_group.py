"""Starts and leaves the process group, and says which rank this is."""

import os
import platform
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from scale_smog.distributed.rendezvous import rendezvous
from scale_smog.errors import CommonError, RankError, UserError

COMMON_FAILURE_S, POLL_S = 10.0, 0.1
TIMEOUT_EXIT_CODE = 3  # 1 is any exception, 2 a user's error; launcher/slurm.sbatch asks for it
_store: dist.Store | None = None  # of the rendezvous
_num_sharing_ranks = 1
_timeout = timedelta(minutes=30)  # of collectives


def init_process_group(timeout_s: float = 1800, rendezvous_timeout_s: float = 600) -> torch.device:
    """Joins the process group and returns this rank's device.

    Works alike under plain python (a group of one), torchrun, deepspeed and srun. CPU tensors
    travel through gloo, CUDA tensors through NCCL.

    Raises:
        UserError: ranks have not come within `rendezvous_timeout_s`, named; more ranks than GPUs
            here; or hosts without a GPU beside others with one, named.
    """
    env = rank_environment()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        num_gpus = torch.cuda.device_count()
        if env["LOCAL_RANK"] >= num_gpus:
            raise RankError(f"local rank {env['LOCAL_RANK']} has no GPU: start {num_gpus} here")
        device = torch.device("cuda", env["LOCAL_RANK"])
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    global _store, _timeout
    _timeout = timedelta(seconds=timeout_s)
    _store = rendezvous(env["RANK"], env["WORLD_SIZE"], rendezvous_timeout_s)
    require_same_device(_store, has_gpu, env["WORLD_SIZE"])
    # Each rank of a gloo group connects to those it talks to, not to all others in each group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    _raise_file_limit()
    with _must_connect_within(rendezvous_timeout_s, env["RANK"]):
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            rank=env["RANK"],
            world_size=env["WORLD_SIZE"],
            store=_store,
            timeout=_timeout,
            device_id=device if has_gpu else None,  # NCCL connects here, not at the first use
        )
    count_sharing_ranks()
    if not has_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(_cores()) // num_sharing_ranks()))
    return device


def computes_in_bf16(device_type: str) -> bool:
    """Whether bf16 is no slower than fp32: not on x86 processors without instructions for it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device_type != "cpu" or not is_x86 or torch.cpu._is_avx512_bf16_supported()


def require_same_device(store: dist.Store, has_gpu: bool, world_size: int) -> None:
    """A host whose driver fails has no GPU for torch, and NCCL's other ranks would wait for it.

    Raises:
        UserError: some ranks have a GPU and some have none; on every rank, names the hosts.
    """
    if not has_gpu:
        number = store.add("num_without_gpu", 1)
        store.set(f"without_gpu_{number}", socket.gethostname())
    if store.add("num_looked_for_gpu", 1) == world_size:  # the last one tells all
        num_without = store.add("num_without_gpu", 0)
        hosts = {store.get(f"without_gpu_{1 + n}").decode() for n in range(num_without)}
        store.set("hosts_without_gpu", ", ".join(sorted(hosts)) if num_without < world_size else "")
    if names := store.get("hosts_without_gpu").decode():
        raise CommonError(f"torch finds no GPU on {names}, but on other hosts: nvidia-smi there")


def _raise_file_limit() -> None:
    """To what the system allows: connections are files, and 1,024 is a usual limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _must_connect_within(seconds: float, rank: int) -> Iterator[None]:
    """Ends the process if the block takes longer: a connect that hangs cannot be interrupted."""

    def abort() -> None:
        print(
            f"error: rank {rank} on {socket.gethostname()} has not connected to the other ranks in "
            f"{seconds:.0f} s: is NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME, the network that all "
            "hosts share? NCCL_DEBUG=INFO says more",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TIMEOUT_EXIT_CODE)

    timer = threading.Timer(seconds, abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def count_sharing_ranks() -> None:
    """Under srun each rank has cores of its own, under other launchers all have the machine's."""
    global _num_sharing_ranks
    mine = socket.gethostname(), sum(1 << core for core in _cores())
    ranks = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(ranks, mine)
    _num_sharing_ranks = sum(host == mine[0] and bool(cores & mine[1]) for host, cores in ranks)


def _cores() -> set[int]:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def num_sharing_ranks() -> int:
    """Ranks of this machine that may use this rank's cores, itself included."""
    return _num_sharing_ranks


def rank_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE from the launcher, or SLURM, or 0 of 1.

    deepspeed asks for them in the environment too, so they are put there.

    Raises:
        UserError: one of them or MASTER_PORT is missing or impossible.
    """
    fallbacks: dict[str, str | None] = {}
    # Inside an allocation but outside srun SLURM_PROCID may be set for one task: not a launcher.
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # as "8(x2)"
        fallbacks = {
            "RANK": os.environ.get("SLURM_PROCID"),
            "WORLD_SIZE": os.environ.get("SLURM_NTASKS"),
            "LOCAL_RANK": os.environ.get("SLURM_LOCALID"),
            "LOCAL_WORLD_SIZE": tasks.group() if tasks else None,
        }
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        default = "1" if "WORLD" in name else "0"
        values[name] = os.environ.get(name) or fallbacks.get(name) or default
    # deepspeed's name for it; what another run left under torchrun's name is older.
    values["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE") or values["LOCAL_WORLD_SIZE"]
    if values["WORLD_SIZE"] != "1" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start with torchrun, deepspeed or "
            "launcher/slurm.sbatch"
        )
    numbers = {name: _number(name, value) for name, value in values.items()}
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[name] >= numbers[size]:
            raise UserError(f"{name}={values[name]} with {size}={values[size]}: ranks count from 0")
    port = os.environ.get("MASTER_PORT")
    if numbers["WORLD_SIZE"] > 1 and not 0 < _number("MASTER_PORT", port) < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port: take one from 1024 to 65535")
    os.environ.update(values)
    return numbers


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdecimal():
        raise UserError(f"{name}={value} in the environment is not a number")
    return int(value)


@contextmanager
def process_group(
    rendezvous_timeout_s: float = 600,
    meeting: AbstractContextManager | None = None,
    timeout_s: float = 1800,
) -> Iterator[torch.device]:
    """The process group from its start to its end (`with`); yields this rank's device.

    A rank that fails alone does not wait for the others, who wait for it: NCCL destroys a group
    together. Its process ends, and with it the group.

    Args:
        rendezvous_timeout_s: how long ranks wait for one another.
        meeting: is entered while they do.
        timeout_s: how long a rank waits for the others in a collective.

    Raises:
        UserError: as `init_process_group`.
        CommonError: in place of a UserError that all ranks have met.
        RankError: in place of one that only this rank has met.
    """
    with meeting or nullcontext():
        device = init_process_group(timeout_s, rendezvous_timeout_s)
    name = rank_and_host()  # without a group every rank is 0
    try:
        yield device
    except BaseException as error:
        may_be_common = isinstance(error, UserError) and not isinstance(error, RankError)
        is_common = may_be_common and _all_ranks_fail()
        if is_common or device.type == "cpu":
            destroy_process_group()
        if is_common:
            raise CommonError(str(error)) from error
        if may_be_common:
            raise RankError(f"{name}: {error}") from error
        raise
    destroy_process_group()


def _all_ranks_fail() -> bool:
    """Whether all ranks come here, soon after one another."""
    assert _store is not None
    end = time.monotonic() + COMMON_FAILURE_S
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


def destroy_process_group() -> None:
    """Leaves the process group; a rank that just exits makes the others' shutdown noisy."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None  # rank 0's port is free again


def end_process(status: int = 0) -> None:
    """Ends one of several ranks at once, its output flushed; call it last of all.

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


def rank_and_host() -> str:
    """This rank as messages name it: "rank 3 on node1"."""
    return f"rank {rank()} on {socket.gethostname()}"


def ranks_per_node() -> int:
    """Processes of this machine, as the launcher counted them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one rank that writes files and talks to the console."""
    return rank() == 0


def collective_timeout() -> timedelta:
    """How long a rank waits for the others in a collective of the run's; groups take it too."""
    return _timeout


def background_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """A second group of all ranks, on the CPU, for a background thread or for long waits.

    None for a single rank. `timeout` is `collective_timeout` unless given.
    """
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timeout or _timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def peak_memory_mib() -> float:
    """Most memory this process has held: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
