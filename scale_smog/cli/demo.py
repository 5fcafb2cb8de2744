"""Makes 10,000 pictures of ten shapes in demo_data/ and trains the recipe `demo` on them.

Two processes, through deepspeed's launcher, unless there is one GPU or one core only; a few minutes
on a CPU. The pictures stay, and the same command goes on where it was stopped.
"""

import argparse
import os
import socket
import sys

from scale_smog.cli.arguments import add_overrides
from scale_smog.runtime.child import run_child

FOLDER = "demo_data"
MOST_RANKS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides and the number of processes."""
    add_overrides(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: at most two)")


def run(arguments: argparse.Namespace) -> int:
    """Makes the pictures and trains."""
    from scale_smog.data.prepare.demo import make_demo

    print(f"== the demo images: 10,000 pictures of ten shapes, as tar shards in {FOLDER}/")
    make_demo(FOLDER)
    command = _launcher(arguments.ranks or _num_ranks())
    command += ["scale_smog", "pretrain", "demo", f"data.path={FOLDER}", *arguments.overrides]
    print(f"== training: {' '.join(command)}", flush=True)
    return run_child(command)


def _launcher(num_ranks: int) -> list[str]:
    if num_ranks == 1:
        return [sys.executable, "-m"]
    ranks = ["--num_gpus", str(num_ranks), "--master_port", str(_free_port()), "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *ranks]


def _num_ranks() -> int:
    import torch

    num_gpus = torch.cuda.device_count()
    return min(MOST_RANKS, num_gpus or len(os.sched_getaffinity(0)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
