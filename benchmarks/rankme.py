"""RankMe and other figures without labels against kNN over the course of runs, and what they cost.

    python benchmarks/rankme.py DEMO_DATA RUNS [--seeds 0 1 2 3 4] [--jobs 2] [--quick]

The demo on one rank and one thread a seed, each a folder in RUNS, judged every 100 steps; the same
command goes on after a stop. Prints a row a run and the share of the training's time that the
figures took, and draws RUNS/rankme.png.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
from compare import claim
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

from scale_smog import load_recipe
from scale_smog.pretrain import pretrain
from scale_smog.reporting import progress
from scale_smog.reporting.run_folder import kept_recipe
from scale_smog.reporting.run_record import RunRecord
from scale_smog.runtime import phases

DEMO = Path(__file__).parent.parent / "recipes" / "demo.yaml"
FIGURES = ("rankme_bank", "rankme_features", "uniformity", "alignment")
QUICK = ("run.steps=4", "run.evaluate_every=2", "run.log_every=2", "data.global_batch=32")
COST_FILE = "cost_of_figures.json"
FIGURES_PHASE = "figures"
MOST_SHARE = 0.005  # of a step


def train(seed: int, data: str, folder: Path, overrides: list[str]) -> None:
    """A run, and its seconds by phase, of which the figures without labels are one."""
    own = [f"data.path={data}", f"run.dir={folder}", f"run.seed={seed}", "engine.kind=ddp"]
    recipe = load_recipe(DEMO, ["run.evaluate_every=100", *own, *overrides])
    if (folder / COST_FILE).exists():
        if kept_recipe(str(folder)) != recipe:
            raise SystemExit(f"{folder} has a run with other settings: another folder")
        return
    torch.set_num_threads(1)
    clock = Clock()
    quality_figures = progress._quality_figures

    def timed(*arguments: Any) -> dict[str, float]:
        clock.enter(FIGURES_PHASE)
        found = quality_figures(*arguments)
        clock.enter(phases.STEP)
        return found

    progress._quality_figures = timed
    phases.on_enter.append(clock.enter)
    pretrain(recipe)
    (folder / COST_FILE).write_text(json.dumps(clock.seconds))


class Clock:
    """Seconds of this thread's processor by phase: other processes take turns on the same core."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._since = phases.START, time.thread_time()

    def enter(self, phase: str) -> None:
        """The phase that begins now."""
        now = time.thread_time()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


def course(folder: Path) -> dict[str, list[float]]:
    """kNN, and each figure in the line next to the evaluation's step."""
    record = RunRecord.read(folder)
    steps, knn = record.curve("knn")
    found = {"step": list(steps), "knn": list(knn)}
    for name in FIGURES:
        logged = dict(zip(*record.curve(name), strict=True))
        found[name] = [logged[min(logged, key=lambda x: abs(x - step))] for step in steps]
    return found


def row(name: str, found: dict[str, list[float]]) -> str:
    """Of the table: kNN early, in the middle and last, ranks, and rank correlations with kNN."""
    knn, bank = found["knn"], found["rankme_bank"]
    at = " ".join(f"{knn[i]:.3f}".lstrip("0") for i in (0, len(knn) // 2, -1))
    cells = [name, at, f"{bank[0]:.0f} to {bank[-1]:.0f}"]
    cells += [f"{spearmanr(found[figure], knn)[0]:.2f}" for figure in FIGURES]
    return "| " + " | ".join(cells) + " |"


def draw(courses: dict[str, dict[str, list[float]]], path: Path) -> None:
    """kNN over the effective rank of the bank, a line a run."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    for name, found in courses.items():
        axes.plot(found["rankme_bank"], found["knn"], "o-", label=name, markersize=5)
    first, last = (next(iter(courses.values()))["step"][i] for i in (0, -1))
    axes.set_xlabel(f"RankMe of the bank, of 128; from step {first} (right) to {last}")
    axes.set_ylabel("kNN top-1")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains what is missing, prints, and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="four steps of small batches")
    arguments, overrides = parser.parse_known_args()
    overrides += QUICK if arguments.quick else ()
    folders = {f"seed {seed}": arguments.runs / f"seed-{seed}" for seed in arguments.seeds}
    tasks = zip(arguments.seeds, folders.values(), strict=True)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        trained = [pool.submit(train, s, arguments.data, f, overrides) for s, f in tasks]
        for run in trained:
            run.result()
    courses = {name: course(folder) for name, folder in folders.items()}
    print("| run | kNN | RankMe of the bank | " + " | ".join(FIGURES) + " |")
    for name, found in courses.items():
        print(row(name, found))
    draw(courses, arguments.runs / "rankme.png")
    costs = [json.loads((folder / COST_FILE).read_text()) for folder in folders.values()]
    spent = {key: sum(cost.get(key, 0.0) for cost in costs) for key in (FIGURES_PHASE, phases.STEP)}
    share = spent[FIGURES_PHASE] / sum(spent.values())
    text = (
        f"share of the steps' processor time that figures without labels take, at most {MOST_SHARE}"
    )
    claim(text, share, MOST_SHARE)


if __name__ == "__main__":
    main()
