"""Runs a function on several gloo ranks, each a process on this machine."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes long to import: all of a run with its engines, the compiler, because DeepSpeed imports
# it with its first engine, and what rank 0 draws with.
PRELOADED = [
    "pytest",
    "scale_smog.pretrain",
    "scale_smog.engine.ddp",
    "scale_smog.engine.fsdp",
    "scale_smog.evaluation.program",
    "torch._inductor.compile_fx",
    "scale_smog.engine.zero",
    "deepspeed",
    "torch.utils.tensorboard",
    "tensorboard.backend.event_processing.event_accumulator",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "timm",
    "scale_smog.data.prepare.shard",
    "scale_smog.data.prepare.verify",
]
TIMEOUT_S = 300  # a rank that waits in vain ends its test, not the test run


def start_forkserver() -> None:
    """Starts, in the background, the clean process that ranks fork from: a third of spawn's time.

    There is one for each pytest process. What the first start of any process has preloaded stays.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    # DeepSpeed chooses the accelerator when it is imported: as the engine has it choose for gloo.
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `fn(*args)` on every rank of a new process group; returns the results in rank order.

    `fn` stands at the top of its module, which the new processes import: heavy libraries that only
    the test compares with are imported inside it. If a rank raises, the others are stopped and its
    traceback is part of the exception raised here.
    """
    start_forkserver()
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
    gc.freeze()  # DeepSpeed collects garbage for every engine, and none of this is any
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


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"
