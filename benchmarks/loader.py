"""Loading 224-px views on the CPU against what people use today, in images a second.

    python benchmarks/loader.py IMAGES [--quick] [--threads N] [--repeats N]

IMAGES is an image folder; its images are sharded first, as they are. The peers read the same tars
with `webdataset` and decode with Pillow in `--threads` DataLoader workers: once with torchvision's
transforms and the same augmentation (Pillow's blur, which is quicker than torchvision's), once
with lightly's SMoGTransform as it comes but for the number of crops. Needs `lightly`.
"""

# webdataset exports its names lazily.
# pyright: reportAttributeAccessIssue=false

import argparse
import collections
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import webdataset
from compare import claim, interleaved, parse_arguments
from lightly.transforms import SMoGTransform  # pyright: ignore
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import MEAN, SIGMA, STD, training_views
from scale_smog.data.datasets import open_split
from scale_smog.data.loaders.build import build_training_loader
from scale_smog.data.prepare.shard import shard_folder

BATCH = 32
NUM_WARM_UP = 6
CPU = torch.device("cpu")
AUGMENT = AugmentConfig()


class PillowViews:
    """Our views with torchvision's transforms on Pillow images."""

    def __init__(self, num_small: int):
        large = [self._view(224, AUGMENT.large_scale, i) for i in (0, 1)]
        small = [self._view(96, AUGMENT.small_scale, 1) for _ in range(num_small)]
        self.views = large + small

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]

    @staticmethod
    def _view(px: int, scale: tuple[float, float], scheme: int) -> Callable:
        a = AUGMENT
        jitter = transforms.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(px, scale, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(a.flip),
                transforms.RandomApply([jitter], a.jitter),
                transforms.RandomGrayscale(a.grey),
                transforms.RandomApply([_pillow_blur], a.blur[scheme]),
                transforms.RandomSolarize(128, a.solarize[scheme]),
                transforms.ToTensor(),
                transforms.Normalize((MEAN / 255).tolist(), (STD / 255).tolist()),
            ]
        )


def _pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*SIGMA)))


def _webdataset_loader(tars: list[str], transform: Callable, workers: int) -> DataLoader:
    dataset = webdataset.WebDataset(
        tars, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False
    )
    dataset = dataset.shuffle(200).decode("pilrgb").rename(image="jpg;png;webp")
    dataset = dataset.to_tuple("image", "cls").map_tuple(transform).repeat()
    return DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=workers)


def _our_loader(path: Path, num_small: int, threads: int, num_steps: int, loader: str) -> Iterable:
    data = DataConfig(
        path=str(path),
        loader=loader,  # type: ignore[arg-type]
        workers=threads,
        global_batch=BATCH,
        num_small_crops=num_small,
    )
    dataset = open_split(path, "train")
    plan = EpochPlan(dataset.num_samples, BATCH)
    views = training_views(data, AUGMENT)
    return build_training_loader(data, views, dataset, plan, range(num_steps), CPU)


def _rates(
    contestants: dict[str, Callable[[], Iterable]], num_batches: int, rounds: int
) -> dict[str, float]:
    """Median images/s of each, in turns; every turn opens a loader anew and warms it up.

    Not `compare.interleaved`: neither the start of worker processes nor what they prepare while
    another has its turn may count.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds):
        order = list(contestants.items())
        for name, build in order if round_ % 2 == 0 else reversed(order):
            batches = iter(build())
            collections.deque(itertools.islice(batches, NUM_WARM_UP), maxlen=0)
            start = time.perf_counter()
            collections.deque(itertools.islice(batches, num_batches), maxlen=0)
            rates[name].append(num_batches * BATCH / (time.perf_counter() - start))
            del batches
    for name, values in rates.items():
        spread = f"{min(values):.4g} to {max(values):.4g}"
        print(f"  {name:<44}{statistics.median(values):10.4g} images/s   ({spread})", flush=True)
    return {name: statistics.median(values) for name, values in rates.items()}


def _compare_views(tars: Path, num_small: int, arguments: argparse.Namespace) -> None:
    threads, folder = arguments.threads, Path(arguments.images)
    num_batches = 6 if arguments.quick else 16
    paths = [str(path) for path in sorted(tars.glob("*.tar"))]
    steps = NUM_WARM_UP + num_batches
    pillow, lightly = PillowViews(num_small), SMoGTransform(crop_counts=(2, num_small))
    contestants = {
        "ours, DALI": lambda: _our_loader(tars, num_small, threads, steps, "dali"),
        "ours, DALI, folder": lambda: _our_loader(folder, num_small, threads, steps, "dali"),
        "ours, torch": lambda: _our_loader(tars, num_small, threads, steps, "torch"),
        "webdataset + torchvision": lambda: _webdataset_loader(paths, pillow, threads),
        "webdataset + lightly": lambda: _webdataset_loader(paths, lightly, threads),
    }
    what = f"2 x 224 + {num_small} x 96 px" if num_small else "2 x 224 px"
    print(f"\n{what}; {num_batches} batches of {BATCH}; {threads} threads or workers")
    rates = _rates(contestants, num_batches, arguments.repeats)
    for peer in ("webdataset + torchvision", "webdataset + lightly"):
        text = f"images/s, {what}, DALI loader on the CPU against {peer}"
        claim(text, rates["ours, DALI"], rates[peer], higher_is_better=True)
    text = f"images/s, {what}, our DALI loader: tars against the same folder"
    claim(text, rates["ours, DALI"], rates["ours, DALI, folder"], higher_is_better=True)


def _compare_readers(tars: Path, folder: Path, rounds: int) -> None:
    """All encoded images, one thread; ours in random order and with their crc32."""
    dataset, files = TarDataset(tars, "train"), open_split(folder, "train")
    paths = [str(path) for path in sorted(tars.glob("*.tar"))]
    order = EpochPlan(dataset.num_samples, dataset.num_samples).ids(0).tolist()

    def ours() -> None:
        for sample_id in order:
            dataset.read(sample_id)

    def ours_of_folder() -> None:
        for sample_id in order:
            files.read(sample_id)

    def theirs() -> None:
        collections.deque(webdataset.WebDataset(paths, shardshuffle=False), maxlen=0)

    print(f"\nreading {dataset.num_samples:,} encoded images of the tars, one thread")
    readers = {"TarDataset.read": ours, "webdataset": theirs, "FolderDataset.read": ours_of_folder}
    ours_s, theirs_s, folder_s = interleaved(readers, rounds).values()
    claim("s, our tar reader against webdataset's", ours_s, theirs_s)
    claim("s, our tar reader against the folder's", ours_s, folder_s)


def main() -> None:
    arguments = parse_arguments(__doc__, images="image folder, such as 400 images of ImageNet")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        tars = Path(folder)
        shard_folder(arguments.images, tars, shard_samples=100, max_bad=0.5)
        _compare_readers(tars, Path(arguments.images), arguments.repeats)
        _compare_views(tars, 4, arguments)
        _compare_views(tars, 0, arguments)


if __name__ == "__main__":
    main()
