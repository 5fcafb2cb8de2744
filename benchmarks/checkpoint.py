"""How long a checkpoint of ResNet-50 blocks the training, against one that is waited for.

Two ranks hold the whole state of `recipes/r50.yaml`: both nets, LARS and the bank of 300 steps of
2048 features. A rank writes its rows of the bank and half of the rest. One JSON line a claim; the
aim is at most 0.2 of the time.
"""

import argparse
import os
import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from scale_smog import distributed, load_recipe
from scale_smog.checkpoint import Checkpoints
from scale_smog.pretrain import build_state

RECIPE = Path(__file__).parent.parent / "recipes" / "r50.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(dir=arguments.folder)
    try:
        settings = (arguments.ranks, port, folder, arguments.repeats)
        mp.start_processes(measure, settings, nprocs=arguments.ranks, start_method="spawn")
    finally:
        shutil.rmtree(folder)


def measure(rank: int, world_size: int, port: int, folder: str, repeats: int) -> None:
    """Runs on every rank; rank 0 prints."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    device = distributed.start()
    recipe = load_recipe(RECIPE, [f"run.dir={folder}/run", "run.keep_checkpoints=1"])
    batch = recipe.data.global_batch // world_size
    state = build_state(recipe, batch, device)
    checkpoints = Checkpoints(recipe.run, {})
    blocked, waited = [], []
    for step in range(repeats + 1):
        distributed.barrier()
        start = time.perf_counter()
        problem = checkpoints.save(step, state.pieces())
        blocked.append(time.perf_counter() - start)
        problem = checkpoints.wait() or problem
        waited.append(time.perf_counter() - start)
        assert problem is None, problem
    if distributed.is_main():
        report(Path(folder) / "run", blocked[1:], waited[1:])  # the first one allocates
        print(f"  the first save blocks for {blocked[0]:.2f} of {waited[0]:.2f} s", flush=True)
    distributed.barrier()
    start = time.perf_counter()
    assert checkpoints.load_newest(state.pieces())
    if distributed.is_main():
        print(f"  verifying and reading it: {time.perf_counter() - start:.2f} s", flush=True)
    distributed.stop()


def report(run_dir: Path, blocked: list[float], waited: list[float]) -> None:
    """Prints medians and the claim."""
    num_bytes = sum(path.stat().st_size for path in run_dir.rglob("*.safetensors"))
    mine, theirs = statistics.median(blocked), statistics.median(waited)
    print(f"  {num_bytes / 2**20:.0f} MiB; torch {torch.__version__}")
    print(f"  blocked {mine:.3f} s ({min(blocked):.3f} to {max(blocked):.3f})")
    print(f"  waited for {theirs:.3f} s ({min(waited):.3f} to {max(waited):.3f})")
    print(f'{{"claim": "share of a save that blocks the step, r50", "value": {mine / theirs:.3f}}}')


if __name__ == "__main__":
    main()
