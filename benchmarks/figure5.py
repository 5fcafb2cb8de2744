"""SMoG's Figure 5 at a small budget: the classes' entropy in the groups of three methods.

    python benchmarks/figure5.py TARS RUNS [key=value …] [--seeds 0 1] [--steps 400] [--quick]

TARS is a dataset of `data_tools/shard.py` with labels and a test split. The methods get the same
net, views, images, steps, K and rates, each run a folder in RUNS; the same command goes on after a
stop. Draws RUNS/group_entropy.png, all overlaid.
"""

import argparse
import shutil
from pathlib import Path

from compare import claim

from scale_smog import load_recipe
from scale_smog.config import MethodConfig, Recipe
from scale_smog.evaluation.groups.program import ENTROPY_PICTURE, evaluate_groups
from scale_smog.pretrain import pretrain
from scale_smog.reporting import run_folder

CIFAR10 = Path(__file__).parent.parent / "recipes" / "cifar10_r18.yaml"
METHODS = {  # the queue and the prototypes' rest are shorter, as the run is
    "smog": (),
    "swav": ("method.frozen_epochs=0.5", "method.queue_steps=10", "method.queue_after_epochs=1.0"),
    "deepcluster_v2": (),
}
COMMON = (
    "model.backbone=resnet_tiny", "model.small_images=false", "data.global_batch=128",
    "data.workers=0", "run.evaluate_every=0", "run.checkpoint_every=100", "evaluation.k=20",
    "evaluation.num_test_images=5000", "evaluation.baselines=false",
)  # fmt: skip
QUICK = ("data.global_batch=32", "model.head_width=256", "grouping.num_groups=20")


def recipe_of(method: str, seed: int, tars: str, folder: Path, overrides: list[str]) -> Recipe:
    """Of one run."""
    own = (f"data.path={tars}", f"run.dir={folder}", f"run.seed={seed}", f"method.name={method}")
    return load_recipe(CIFAR10, [*COMMON, *own, *METHODS[method], *overrides])


def main() -> None:
    """Trains what is missing, draws, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="two steps of small batches")
    arguments, overrides = parser.parse_known_args()
    steps = 2 if arguments.quick else arguments.steps
    overrides += [f"run.steps={steps}", *(QUICK if arguments.quick else ())]
    folders: list[Path] = []
    for seed in arguments.seeds:
        for method in METHODS:
            folders.append(arguments.runs / f"{method}_{seed}")
            pretrain(recipe_of(method, seed, arguments.tars, folders[-1], overrides))
    evaluate_groups([str(folder) for folder in folders], ())
    shutil.copy(folders[0] / ENTROPY_PICTURE, arguments.runs / ENTROPY_PICTURE)
    found = {folder: run_folder.read_results(folder)["groups"] for folder in folders}
    of_default, of_others = [], []
    for folder, groups in found.items():
        is_default = folder.name.startswith(f"{MethodConfig().name}_")
        (of_default if is_default else of_others).append(groups["low_entropy_groups"])
    text = "share of groups below one nat, SMoG against the best of the others"
    claim(text, max(of_default), max(of_others), higher_is_better=True)


if __name__ == "__main__":
    main()
