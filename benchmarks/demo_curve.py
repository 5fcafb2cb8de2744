"""The beginning of the demo on one rank and one thread: what it must be again on any day.

    python benchmarks/demo_curve.py DEMO_DATA [--quick] [--breaks]

Writes results/demo_curve.json, which `tests/test_demo.py` compares with. With --breaks the
method is broken in three ways, and each must be found.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from compare import claim
from step import one_rank

from scale_smog import load_recipe
from scale_smog.config import Recipe
from scale_smog.data import TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_plan
from scale_smog.data.loaders.memory import MemoryLoader
from scale_smog.grouping import chance_loss, perplexity
from scale_smog.loop import train_step
from scale_smog.schedules import Schedules
from scale_smog.state import build_state

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "results" / "demo_curve.json"
CPU = torch.device("cpu")
NUM_TESTED, WINDOW, FIRST_RESET, USAGE_STEPS = 80, 10, 20, 40  # steps
LOSS_TOLERANCE, PERPLEXITY_TOLERANCE = 0.05, 0.10
Curve = dict[str, list[float]]  # name -> a value for each step
BREAKS = {
    "k-means off": ("grouping.kmeans=false",),
    "beta = 0": ("grouping.beta_start=0.0", "grouping.beta_end=0.0"),
    "a frozen momentum net": ("model.ema=1.0", "grouping.reset_momentum=false"),
}


def demo_recipe(data: str | Path, *overrides: str) -> Recipe:
    """The demo for one rank, at a rate at which processors that round differently stay together."""
    own = [f"data.path={data}", "engine.kind=ddp", "optimizer.base_lr=2e-3"]
    return load_recipe(ROOT / "recipes" / "demo.yaml", [*own, *overrides])


def curve(recipe: Recipe, num_steps: int) -> Curve:
    """Loss of each of the first steps, and the perplexity of the groups' use after it."""
    torch.set_num_threads(1)
    dataset = TarDataset(recipe.data.path, "train")
    plan = build_plan(recipe.data, dataset, recipe.run.seed)
    schedules = Schedules.of_run(recipe.run, recipe.optimizer, recipe.grouping, plan)
    views = training_views(recipe.data, recipe.augment)
    source = BatchSource(dataset, plan, views, recipe.run.seed, 0, 1)
    loader = MemoryLoader(source, range(num_steps), CPU)
    found: Curve = {"loss": [], "perplexity": []}
    with one_rank():
        state = build_state(recipe, recipe.data.global_batch, CPU)
        num_start = -(-state.method.num_first_images // recipe.data.global_batch)
        state.method.start(islice(loader, num_start))
        for step, batch in enumerate(loader):
            report = train_step(state, batch, schedules.at(step))
            assert report.usage
            found["loss"].append(report.loss.item())
            found["perplexity"].append(perplexity(report.usage.counts()))
    return found


def faults(found: Curve, recorded: dict[str, Curve]) -> list[str]:
    """Where a course leaves the nearest recorded one; nothing if it is the same.

    One is recorded for each kind of vector instructions: kernels round differently, and after
    thirty steps that is a twentieth of the loss.
    """
    return min((_differences(found, each) for each in recorded.values()), key=len)


def _differences(found: Curve, recorded: Curve) -> list[str]:
    """Losses are compared as means of ten steps. Usage counts cover forty steps, so the first that
    holds features of new groups only is forty after a reset."""
    said = []
    for start in range(0, len(found["loss"]) - WINDOW + 1, WINDOW):
        ours, theirs = (mean(x["loss"][start : start + WINDOW]) for x in (found, recorded))
        if abs(ours - theirs) > LOSS_TOLERANCE:
            said.append(f"loss after step {start}: {ours:.3f}, recorded {theirs:.3f}")
    for step in range(FIRST_RESET + USAGE_STEPS, len(found["perplexity"]), WINDOW):
        ours, theirs = found["perplexity"][step], recorded["perplexity"][step]
        if abs(ours / theirs - 1) > PERPLEXITY_TOLERANCE:
            said.append(f"perplexity after step {step}: {ours:.1f}, recorded {theirs:.1f}")
    return said


def main() -> None:
    """Records the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--quick", action="store_true", help="ten steps, nothing recorded")
    parser.add_argument("--breaks", action="store_true")
    arguments = parser.parse_args()
    if arguments.breaks:
        num_found = 0
        for name, overrides in BREAKS.items():
            broken = curve(demo_recipe(arguments.data, *overrides), NUM_TESTED)
            said = faults(broken, json.loads(FILE.read_text()))
            num_found += bool(said)
            print(f"{name}: {len(said)} faults; first: {(said or ['none'])[0]}", flush=True)
        raise SystemExit(num_found < len(BREAKS))
    recipe = demo_recipe(arguments.data)
    found = curve(recipe, 10 if arguments.quick else NUM_TESTED)
    if not arguments.quick:
        record(found)
    claim(
        "last loss of the demo's beginning against chance",
        found["loss"][-1],
        chance_loss(recipe.grouping.num_groups),
    )


def record(found: Curve) -> None:
    """Writes the curve, beside those of processors with other vector instructions."""
    rounded = {name: [round(x, 4) for x in values] for name, values in found.items()}
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    recorded[torch.backends.cpu.get_cpu_capability()] = rounded
    FILE.write_text(json.dumps(recorded) + "\n")
    print(f"written to {FILE}")


if __name__ == "__main__":
    main()
