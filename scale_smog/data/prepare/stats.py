"""What a dataset folder holds, in words and in a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data.augment import MEAN, STD, training_views
from scale_smog.data.datasets import Images, is_tars, list_splits, open_split, remarks
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.data.manifest import load_manifest
from scale_smog.data.plan import EpochPlan
from scale_smog.errors import UserError

_BAR = 40  # characters of the longest bar
_EDGES_PX = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_GAP_PX = 4


def describe(out: str | Path) -> str:
    """Counts, bytes, classes and a histogram of the shorter side, split by split.

    Raises:
        UserError: it is no dataset of tars or folder of images, or a file of it is missing.
    """
    lines = []
    for name in list_splits(out) or ("train",):
        dataset = open_split(out, name)
        lines += [f"split {name}: {dataset.num_samples:,} images{_files(out, name)}"]
        lines += _class_lines(dataset) + _side_lines(dataset)
        lines += [f"  {remark}" for remark in remarks(dataset)]
    return "\n".join(lines)


def _files(out: str | Path, name: str) -> str:
    if not is_tars(out):
        return " in a folder"
    split = load_manifest(out).split(name)
    num_mib = sum(entry.bytes for entry in split.shards) / 2**20
    each = num_mib * 1024 / split.num_samples
    return f" in {len(split.shards):,} shards, {num_mib:,.1f} MiB, {each:,.1f} KiB an image"


def _class_lines(dataset: Images) -> list[str]:
    labelled = dataset.labels[dataset.labels >= 0]
    if not len(labelled):
        return ["  unlabelled"]
    counts = np.bincount(labelled, minlength=dataset.num_classes)
    most, least = int(counts.argmax()), int(counts.argmin())
    return [
        f"  {dataset.num_classes:,} classes; most images: {dataset.classes[most]} "
        f"({counts[most]:,}), fewest: {dataset.classes[least]} ({counts[least]:,}); "
        f"{dataset.num_samples - len(labelled):,} images without a label"
    ]


def _side_lines(dataset: Images) -> list[str]:
    shorter = np.minimum(dataset.widths, dataset.heights)
    counts, _ = np.histogram(shorter, bins=[*_EDGES_PX, np.inf])
    lines = [f"  shorter side, px: median {np.median(shorter):g}, {shorter.min()}-{shorter.max()}"]
    for low, count in zip(_EDGES_PX, counts, strict=True):
        if count:
            bar = "#" * max(1, round(_BAR * count / counts.max()))
            lines.append(f"    from {low:>4} {count:>10,} {bar}")
    return lines


def draw_samples(out: str | Path, path: str | Path, num_images: int = 8, seed: int = 0) -> None:
    """Saves a sheet of augmented views: a row an image, two large views and four small ones.

    Raises:
        UserError: the folder has no manifest, or a file of it is missing.
    """
    splits = list_splits(out)
    dataset = open_split(out, splits[0] if splits and "train" not in splits else "train")
    data = DataConfig(path=str(out), num_small_crops=4)
    views = training_views(data, AugmentConfig())
    plan = EpochPlan(dataset.num_samples, min(num_images, dataset.num_samples), seed)
    source = BatchSource(dataset, plan, views, seed, 0, 1)
    (batch,) = TorchLoader(source, range(1), 0, torch.device("cpu"))
    rows = list(zip(*batch.large, *batch.small, strict=True))  # of views [3, px, px]
    width = sum(view.px + _GAP_PX for view in views)
    height = data.large_px + _GAP_PX
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for number, row in enumerate(rows):
        left = 0
        for view in row:
            pixels = view.permute(1, 2, 0).numpy() * STD + MEAN  # [px, px, 3], 0 to 255
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
            sheet.paste(image, (left, number * height))
            left += image.width + _GAP_PX
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # a folder that is not there, or no image's name
        raise UserError(f"cannot write {path}: {error}") from None
