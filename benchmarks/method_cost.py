"""What a step of each method costs: seconds and memory on the same net, views and batch.

    python benchmarks/method_cost.py [--quick]

One thread, random views; methods take turns, and of each the median counts. On a CPU these are
seconds of the processor, which a busy machine changes little, and memory is what the process has
grown by; on a GPU seconds of the clock and the allocator's peak.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from compare import claim
from step import one_rank

from scale_smog.config import MethodConfig, Recipe
from scale_smog.loop import train_step
from scale_smog.methods import METHODS
from scale_smog.profiling.timing import synchronize
from scale_smog.state import TrainState, build_state
from scale_smog.throughput import FIXED_VALUES, build_batches

FILE = Path(__file__).parent / "results" / "method_cost.json"


def recipe_of(method: str, batch: int) -> Recipe:
    """The small net of docs/learning.md on views of 32 px, K 400."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return Recipe.model_validate(
        {
            "run": {"steps": 100},
            "data": {"path": "", "num_images": 10_000, "global_batch": batch, "large_px": 32},
            "model": {"backbone": "resnet_tiny"},
            "method": {"name": method},
            "grouping": {"num_groups": 400, "reset_every": 10**6, "bank_steps": 20},
            "optimizer": {"name": "adamw"},
            "engine": {"precision": precision},
        }
    )


class Side:
    """One method, built and warmed up."""

    def __init__(self, method: str, batch: int, device: torch.device):
        recipe = recipe_of(method, batch)
        self.device = device
        self.state: TrainState = build_state(recipe, batch, device)
        self.views = next(iter(build_batches(recipe, batch, 1, True, device)))
        for _ in range(2):
            self.step()

    def step(self) -> float:
        """Seconds of one."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        begin = clock()
        train_step(self.state, self.views, FIXED_VALUES)
        synchronize(self.device)
        return clock() - begin


def peak_mib(method: str, batch: int) -> float:
    """Of a process of its own, over what it had before there were nets."""
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    before = _status_mib("VmRSS")
    with one_rank():
        Side(method, batch, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    """Of this process: what it has in memory (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(batch: int, num_turns: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak memory of every method."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    with one_rank():
        sides = {method: Side(method, batch, device) for method in METHODS}
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(num_turns):
            for method, side in sides.items():
                seconds[method].append(side.step())
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {method: pool.apply(peak_mib, (method, batch)) for method in METHODS}
    return {
        method: {"step_s": statistics.median(seconds[method]), "peak_mib": memory[method]}
        for method in METHODS
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown, with ratios to the default method."""
    default = found[MethodConfig().name]
    rows = ["| method | s a step | of SMoG's | MiB |", "|---|---|---|---|"]
    for method, each in found.items():
        ratio = each["step_s"] / default["step_s"]
        rows.append(f"| {method} | {each['step_s']:.3f} | {ratio:.2f} | {each['peak_mib']:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Measures, prints and writes results/method_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps of a small batch")
    quick = parser.parse_args().quick
    found: dict[str, dict[str, Any]] = measure(8 if quick else 128, 2 if quick else 11)
    print(table(found))
    if not quick:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    default, slowest = found[MethodConfig().name], max(x["step_s"] for x in found.values())
    text = "seconds of a step of SMoG against the slowest method"
    claim(text, default["step_s"], slowest, higher_is_better=False)


if __name__ == "__main__":
    main()
