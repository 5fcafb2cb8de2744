"""Runs a function on several gloo ranks, each a process on this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The compiler, because DeepSpeed imports it with its first engine.
PRELOADED = ["pytest", "scale_smog.loop", "scale_smog.engine.fsdp", "torch._inductor.compile_fx"]
TIMEOUT_S = 60  # a rank that waits in vain ends its test, not the test run


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `fn(*args)` on every rank of a new process group; returns the results in rank order.

    `fn` stands at the top of its module, so that the new processes can import it. If a rank raises,
    the others are stopped and its traceback is part of the exception raised here.
    """
    # Ranks fork from a clean process that has imported what takes seconds: a third of spawn's time.
    multiprocessing.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        run = (world_size, Path(folder), dict(os.environ), fn, args)
        mp.start_processes(_run_rank, run, nprocs=world_size, start_method="forkserver")
        # Written by this test run, hence safe to unpickle.
        return [torch.load(_result(Path(folder), r), weights_only=False) for r in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the clean process has the environment of the first call
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(fn(*args), _result(folder, rank))
    # Not on errors: the other ranks would fail too, and might be the first to report.
    dist.destroy_process_group()
    os._exit(0)  # as `distributed.end_process`, and for its reason


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"
