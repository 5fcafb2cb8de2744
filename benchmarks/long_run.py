"""Long runs on CIFAR-10 with a small net: SMoG, what it is compared with, and its parts taken away.

    python benchmarks/long_run.py TARS [LABEL …] [--images 10000] [--epochs 200] [--seeds 0 1]

TARS is CIFAR-10 by `data_tools/shard.py`, its training and its test folder; views, net, batch and
judge are those of `cifar10.py`. A run takes half an hour to an hour on a core. Without LABELs, all
of them. Writes a line a run to results/long_run.jsonl and draws long_run_IMAGES_EPOCHS.png with the
runs it was asked for; the same command goes on after a stop.

"paper's regime" is as in section 4.1: a reset every 300 steps from the features of those 300, and a
momentum net of α 0.999; the three rows below it are Table 7b's, without one of the resets or both.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compare import claim
from learning import QUICK, Run, campaign, mean_of, table

RESULTS = Path(__file__).parent / "results" / "long_run.jsonl"
PAPER = "ours grouping.reset_every=300 grouping.bank_steps=300 model.ema=0.999"
OURS, LIGHTLY, SIMCLR = "SMoG", "SMoG, lightly", "SimCLR"
ROWS = {  # label: method and settings; what is not given is derived from the number of images
    OURS: "ours",
    "SMoG, paper's regime": PAPER,
    "the same, k-means only": f"{PAPER} grouping.reset_momentum=false",
    "the same, momentum net only": f"{PAPER} grouping.kmeans=false",
    "the same, neither reset": f"{PAPER} grouping.kmeans=false grouping.reset_momentum=false",
    LIGHTLY: "lightly_smog",
    SIMCLR: "simclr",
    "MoCo v3": "moco_v3 model.ema=0.99",
    "BYOL": "byol model.ema=0.99",
    "SwAV": "swav",
    "DeepCluster v2": "deepcluster_v2",
}
CURVE_POINTS = 20


def main() -> None:
    """Trains what is missing, prints the table and draws the curves."""
    arguments = parse()
    length = f"run.epochs={arguments.epochs} data.num_images={arguments.images}"
    changes = " ".join((length, *QUICK)) if arguments.quick else length
    runs = [
        Run.parse(
            f"{label}: {ROWS[label]} {changes}", seed, "cifar10", arguments.tars, CURVE_POINTS
        )
        for seed in arguments.seeds
        for label in arguments.labels or ROWS
    ]
    with TemporaryDirectory() as folder:
        results = Path(folder) / RESULTS.name if arguments.quick else RESULTS
        lines = campaign(runs, results, arguments.jobs)
    print(table(lines))
    if not arguments.quick:
        draw(lines, arguments.images, arguments.epochs)
    by_label = {line["label"]: [x for x in lines if x["label"] == line["label"]] for line in lines}
    means = {label: mean_of(group, "test") for label, group in by_label.items()}
    for peer in (LIGHTLY, SIMCLR):
        if {OURS, peer} <= means.keys():
            text = f"kNN top-1 after {arguments.epochs} epochs, SMoG against {peer}"
            claim(text, means[OURS], means[peer], higher_is_better=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars")
    parser.add_argument("labels", nargs="*", metavar="LABEL", help=", ".join(ROWS))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--quick", action="store_true", help="two steps of each")
    parser.add_argument(
        "--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count()
    )
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.labels) - set(ROWS):
        parser.error(f"no {sorted(unknown)[0]!r} among {', '.join(ROWS)}")
    return arguments


def draw(lines: list[dict[str, Any]], images: int, epochs: int) -> None:
    """Accuracy over the epochs, a line a method and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(ROWS):
        for repeat, line in enumerate(one for one in lines if one["label"] == label):
            per_epoch = line["curve"][-1]["step"] / epochs
            at = [point["step"] / per_epoch for point in line["curve"]]
            values = [point["test"] for point in line["curve"]]
            name = None if repeat else label
            style = "-" if number < 10 else ":"  # of colours there are ten
            axes.plot(at, values, color=f"C{number % 10}", ls=style, lw=1.2, label=name)
    title = f"{images:,} images of CIFAR-10, 0.31 M weights"
    axes.set(xlabel="epoch", ylabel="kNN top-1, test", title=title)
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(RESULTS.with_name(f"long_run_{images}_{epochs}.png"), dpi=110)


if __name__ == "__main__":
    main()
