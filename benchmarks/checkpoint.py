"""How long a checkpoint of ResNet-50 blocks the training, against one that is waited for.

Two ranks hold the whole state of `recipes/r50.yaml`: both nets, LARS and the bank of 300 steps of
2048 features. A rank writes its rows of the bank and half of the rest. The aim is a ratio of 5.
"""

import os
import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from compare import claim, parse_arguments

from scale_smog import distributed, load_recipe
from scale_smog.checkpoint import Checkpoints
from scale_smog.state import build_state

RECIPE = Path(__file__).parent.parent / "recipes" / "r50.yaml"
QUICK = ["model.backbone=resnet_tiny", "model.head_width=64", "grouping.num_groups=100"]
QUICK += ["grouping.bank_steps=10", "data.global_batch=64"]
RANKS = 2


def main() -> None:
    """Prints the times and the claim."""
    arguments = parse_arguments(__doc__)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp()
    try:
        settings = (RANKS, port, folder, arguments.repeats, arguments.quick)
        mp.start_processes(measure, settings, nprocs=RANKS, start_method="spawn")
    finally:
        shutil.rmtree(folder)


def measure(rank: int, world_size: int, port: int, folder: str, repeats: int, quick: bool) -> None:
    """Runs on every rank; rank 0 prints."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    device = distributed.init_process_group()
    overrides = [f"run.dir={folder}/run", "run.keep_checkpoints=1", *(QUICK if quick else [])]
    recipe = load_recipe(RECIPE, overrides)
    batch = recipe.data.global_batch // world_size
    state = build_state(recipe, batch, device)
    checkpoints = Checkpoints(recipe.run, {})
    blocked, waited = [], []
    for step in range(repeats + 1):
        distributed.barrier()
        start = time.perf_counter()
        problem = checkpoints.save(step, state.state_dict())
        blocked.append(time.perf_counter() - start)
        problem = checkpoints.wait() or problem
        waited.append(time.perf_counter() - start)
        assert problem is None, problem
    distributed.barrier()
    start = time.perf_counter()
    assert checkpoints.load_newest(state.state_dict())
    if distributed.is_main():
        print(f"  the first save blocks for {blocked[0]:.2f} of {waited[0]:.2f} s")
        print(f"  verifying and reading it: {time.perf_counter() - start:.2f} s")
        report(Path(folder) / "run", blocked[1:], waited[1:])  # the first one allocates
    distributed.destroy_process_group()


def report(run_dir: Path, blocked: list[float], waited: list[float]) -> None:
    """Prints medians and the claim."""
    num_bytes = sum(path.stat().st_size for path in run_dir.rglob("*.safetensors"))
    mine, theirs = statistics.median(blocked), statistics.median(waited)
    print(f"  {num_bytes / 2**20:.0f} MiB; torch {torch.__version__}")
    print(f"  blocked {mine:.3f} s ({min(blocked):.3f} to {max(blocked):.3f})")
    print(f"  waited for {theirs:.3f} s ({min(waited):.3f} to {max(waited):.3f})")
    claim("seconds that a save blocks the step, against a save that is waited for", mine, theirs)


if __name__ == "__main__":
    main()
