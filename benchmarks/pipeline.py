"""Loading while training: the pipeline against the slower of loader and training by themselves.

    python benchmarks/pipeline.py IMAGES [--quick] [--repeats N]

IMAGES is an image folder. In all three measurements the loader's threads have one core and training
another, so that neither takes the other's. Once as it is, once with a disk that takes 5 ms to
answer each read. A perfect pipeline has 1.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from compare import claim, interleaved_streams, parse_arguments
from step import one_rank

from scale_smog.config import Recipe
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.loaders.build import build_training_loader
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.loop import train_step
from scale_smog.state import build_state
from scale_smog.throughput import FIXED_VALUES, build_batches

BATCH, PX, LATENCY_S, NUM_WARM_UP = 32, 96, 0.005, 4
FLOOR, WAITING_FLOOR = 0.90, 0.92
CPU = torch.device("cpu")
CORES = sorted(os.sched_getaffinity(0))


class SlowDataset(TarDataset):
    """A dataset on a disk that takes its time."""

    def read(self, sample_id: int) -> bytes:
        """The file of a sample, after the disk's latency."""
        time.sleep(LATENCY_S)
        return super().read(sample_id)


def recipe_of(tars: Path, backbone: str) -> Recipe:
    """A step that takes about as long as its loading."""
    return Recipe.model_validate(
        {
            "run": {"steps": 1},
            "data": {"path": str(tars), "global_batch": BATCH, "workers": 1, "large_px": PX},
            "model": {"backbone": backbone, "head_width": 512},
            "grouping": {"num_groups": 300, "kmeans": False, "init": "random", "bank_steps": 10},
            "engine": {"precision": "fp32"},
        }
    )


class Sides:
    """Loader, training, and both."""

    def __init__(self, recipe: Recipe, dataset: TarDataset, num_steps: int):
        self._recipe, self._dataset = recipe, dataset
        self._num_batches = NUM_WARM_UP + num_steps
        self._state = build_state(recipe, BATCH, CPU)
        self._train_core, self._load_core = CORES[:2]

    def loader(self) -> Iterator[Batch]:
        """Batches, made on the loader's core; they arrive on the other one."""
        # Threads run where the thread that starts them runs, and all start with the first batch.
        os.sched_setaffinity(0, {self._load_core})
        data = self._recipe.data
        views = training_views(data, self._recipe.augment)
        plan = EpochPlan(self._dataset.num_samples, BATCH)
        steps = range(self._num_batches)
        batches = iter(build_training_loader(data, views, self._dataset, plan, steps, CPU))
        first = next(batches)
        os.sched_setaffinity(0, {self._train_core})
        return itertools.chain([first], batches)

    def training(self) -> Iterator[None]:
        """Steps on random views."""
        os.sched_setaffinity(0, {self._train_core})
        return self._train(iter(build_batches(self._recipe, BATCH, self._num_batches, True, CPU)))

    def pipeline(self) -> Iterator[None]:
        """Steps on the loader's batches."""
        return self._train(self.loader())

    def _train(self, batches: Iterator[Batch]) -> Iterator[None]:
        for batch in batches:
            train_step(self._state, batch, FIXED_VALUES)
            yield


def measure(
    recipe: Recipe, dataset: TarDataset, num_steps: int, repeats: int
) -> tuple[float, float]:
    """Images/s of the pipeline, and of the slower of its two sides."""
    sides = Sides(recipe, dataset, num_steps)
    contestants = {
        "loader alone": sides.loader,
        "training alone": sides.training,
        "pipeline": sides.pipeline,
    }
    loader_s, training_s, both_s = interleaved_streams(
        contestants, NUM_WARM_UP, num_steps, repeats
    ).values()
    return BATCH / both_s, BATCH / max(loader_s, training_s)


def main() -> None:
    """Prints the three times twice, and the claims."""
    arguments = parse_arguments(__doc__, images="image folder, such as 400 images of ImageNet")
    torch.set_num_threads(1)
    if len(CORES) < 2:
        raise SystemExit("this needs two cores: one for the loader, one for training")
    num_steps = 4 if arguments.quick else 12
    with tempfile.TemporaryDirectory() as folder, one_rank():
        tars = Path(folder)
        shard_folder(arguments.images, tars, shard_samples=100, max_bad=0.5)
        recipe = recipe_of(tars, "resnet_tiny")
        rates = {}
        for name, kind in (("as it is", TarDataset), ("5 ms a read", SlowDataset)):
            print(f"{name}; 2 x {PX} px, {num_steps} batches of {BATCH}, one core each")
            rates[name] = measure(recipe, kind(tars, "train"), num_steps, arguments.repeats)
    for (name, (both, slower)), floor in zip(rates.items(), (FLOOR, WAITING_FLOOR), strict=True):
        text = f"images/s of loading and training as a share of the slower alone, {name}"
        claim(f"{text} (at least {floor})", both, slower, higher_is_better=True)


if __name__ == "__main__":
    main()
