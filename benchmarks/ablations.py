"""The ablations of Tables 7a-d at small scale: trains each recipe on a small labelled dataset.

python benchmarks/ablations.py demo_data
python benchmarks/ablations.py demo_data --only baseline 7b --seeds 3 run.steps=700 \\
    grouping.num_groups=200 grouping.reset_every=60
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compare import claim

ROOT = Path(__file__).parent.parent
SMALL = """
    data.global_batch=128 data.device=cpu data.workers=1 data.large_px=32
    augment.large_scale=[0.25,0.7] augment.brightness=0.2 augment.saturation=0.8 augment.hue=0.5
    augment.grey=0.5 augment.blur=[0.0,0.0] augment.solarize=[0.0,0.0]
    model.backbone=resnet_tiny model.head_width=512 model.ema=0.9
    optimizer.name=adamw optimizer.base_lr=2e-3 optimizer.lr_batch=128 optimizer.weight_decay=0.01
    optimizer.warmup_epochs=0.5 engine.precision=fp32 run.steps=30 run.log_every=10
    evaluation.temperature=0.1 evaluation.image_px=48 evaluation.crop_share=1.0
""".split()  # the demo's settings, but for the groups


def train(recipe: Path, folder: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Trains in `folder`; returns the figures of its end and the warnings on its way."""
    program = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), str(recipe)]
    ended = subprocess.run(
        [*program, f"run.dir={folder}", *overrides], cwd=ROOT, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{recipe.name}: {ended.stderr.strip().splitlines()[-1]}")
    results = json.loads((folder / "results.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning")]
    return {
        "knn": results["knn"]["trained"],
        "perplexity": results["groups"]["perplexity"],
        "in_use": results["groups"]["in_use"],
        "largest": last["largest_group_share"],
        "loss": last["loss"],
    }, warnings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--only", nargs="+", default=[""], help="recipes whose names begin so")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps of Table 7b")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.quick:
        arguments.only = ["7b_k"]
        arguments.overrides = ["run.steps=4", *arguments.overrides]
    accuracy = {}
    print(
        f"{'recipe':<26}{'kNN top-1':>16}{'perplexity':>12}{'in use':>8}{'largest':>9}{'loss':>7}"
    )
    for recipe in sorted((ROOT / "recipes" / "ablations").glob("*.yaml")):
        if not recipe.name.startswith(tuple(arguments.only)):
            continue
        runs, warnings = [], []
        for seed in range(arguments.seeds):
            with TemporaryDirectory() as folder:
                own = [f"data.path={arguments.dataset}", f"run.seed={seed}", *arguments.overrides]
                figures, said = train(recipe, Path(folder) / "run", [*SMALL, *own])
                runs.append(figures)
                warnings += said
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        accuracy[recipe.stem] = mean["knn"]
        spread = max(run["knn"] for run in runs) - min(run["knn"] for run in runs)
        print(
            f"{recipe.stem:<26}{mean['knn']:>8.3f} ± {spread / 2:.3f}{mean['perplexity']:>12.1f}"
            f"{mean['in_use']:>8.0f}{mean['largest']:>9.3f}{mean['loss']:>7.2f}",
            flush=True,
        )
        if warnings:
            print(f"    {warnings[-1]}", flush=True)
    best, worst = (pick(accuracy, key=accuracy.__getitem__) for pick in (max, min))
    text = f"kNN top-1 of {best} against {worst}"
    claim(text, accuracy[best], accuracy[worst], higher_is_better=True)


if __name__ == "__main__":
    main()
