"""CIFAR-10 at a small budget: SMoG, lightly's SMoG and other methods on the same net and views.

    python benchmarks/cifar10.py TARS [--seeds 0 1 2] [--quick] [section.key=value …]

TARS is CIFAR-10 by `data_tools/shard.py`, its training and its test folder. 600 steps of 256
images, a net of 0.31 M parameters; the last 5,000 training images are held out to choose settings
on. Writes results/cifar10.jsonl, a line a run, and cifar10.png; the same command goes on after a
stop, and other settings are other runs. JPEG copies cost CIFAR-10 a little accuracy. On a GPU,
`model.backbone=resnet18 model.small_images=true run.epochs=200 data.global_batch=512` compares at
the length of lightly's own table.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compare import claim
from learning import QUICK, Run, campaign, mean_of, table

RESULTS = Path(__file__).parent / "results" / "cifar10.jsonl"
OURS, LIGHTLY, SIMCLR = "SMoG, ours", "SMoG, lightly, tuned", "SimCLR"
# Label: method and settings; those of small sets (small_data.py) are everyone's.
ROWS = {
    OURS: "ours",
    LIGHTLY: "lightly_smog grouping.num_groups=500 grouping.reset_every=60 grouping.bank_steps=60",
    SIMCLR: "simclr",
    "SMoG, ours, after 200 instance-contrastive steps (not in the paper)": (
        "ours grouping.instance_warmup_steps=200"
    ),
    "SMoG, ours, a third view trained too (multi-crop)": (
        "ours data.num_small_crops=1 data.small_px=32 augment.small_scale=[0.2,1.0]"
    ),
    "SimCLR, lightly": "lightly_simclr",
    "MoCo v3": "moco_v3 model.ema=0.99",
    "BYOL": "byol model.ema=0.99",
    "SwAV": "swav",
    "DeepCluster v2": "deepcluster_v2",
    "SMoG, lightly, its example's settings": "lightly_smog_as_it_is",
    "those 200 steps alone, then stop": "simclr run.steps=200",
}


def main() -> None:
    """Trains what is missing, prints the table and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="two steps of three methods")
    parser.add_argument(
        "--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count()
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    rows = ROWS
    if arguments.quick:
        arguments.seeds = [0]
        arguments.overrides += QUICK
        rows = {name: ROWS[name] for name in (OURS, LIGHTLY, SIMCLR)}
    changes = " ".join(arguments.overrides)
    runs = [
        Run.parse(f"{label}: {settings} {changes}", seed, "cifar10", arguments.tars)
        for seed in arguments.seeds
        for label, settings in rows.items()
    ]
    with TemporaryDirectory() as folder:
        results = Path(folder) / "quick.jsonl" if arguments.quick else RESULTS
        lines = campaign(runs, results, arguments.jobs)
    print(table(lines))
    if not arguments.quick:
        draw(lines, RESULTS.with_suffix(".png"))
    means = {
        name: mean_of([line for line in lines if line["label"] == name], "test") for name in rows
    }
    for peer in (LIGHTLY, SIMCLR):
        text = f"kNN top-1 on CIFAR-10, SMoG of ours against {peer}"
        claim(text, means[OURS], means[peer], higher_is_better=True)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the steps, a line a method and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(ROWS):
        for line in lines:
            if line["label"] == label:
                steps = [point["step"] for point in line["curve"]]
                values = [point["test"] for point in line["curve"]]
                name = label if line["seed"] == lines[0]["seed"] else None
                axes.plot(steps, values, color=f"C{number}", marker=".", lw=1.2, label=name)
    axes.set(
        xlabel="step, of 256 images", ylabel="kNN top-1, test", title="CIFAR-10, 0.31 M weights"
    )
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
