"""Which labels a classifier learns from: SimCLR's lists, balanced draws, held-out images."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scale_smog.data.datasets import Images
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.errors import UserError
from scale_smog.evaluation.protocols import FinetuneConfig

LARGEST_MISMATCH = 0.2  # of a list's share of the labels and the setting's


def labelled_samples(config: FinetuneConfig, dataset: Images) -> np.ndarray:
    """The sample ids whose labels are used: of a list, else a balanced draw.

    Raises:
        UserError: the list does not fit the dataset.
    """
    if not config.list:
        return balanced_subset(dataset.labels, config.share, config.seed)
    ids = listed_samples(dataset, config.list)
    share = len(ids) / dataset.num_samples
    if abs(share / config.share - 1) > LARGEST_MISMATCH:
        raise UserError(
            f"{config.list} names {share:.2g} of the images, and the setting is that of "
            f"finetune.share={config.share:g}: give finetune.share={share:.2g}"
        )
    return ids


def balanced_subset(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A seeded draw of a share of the samples, equally many of each class to within one.

    Args:
        labels: of all samples [N], 0 to C - 1.
        share: of the samples, above 0; each class gives its own part, at least one sample.
        seed: of the draw.

    Returns:
        Sample ids [M] int64, ascending.
    """
    if share >= 1:
        return np.arange(len(labels))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    classes = np.unique(labels)
    # As many of each class as the mean class gives: the lists of SimCLR are as even.
    num_wanted = max(1, round(share * len(labels) / len(classes)))
    chosen = [order[labels[order] == label][:num_wanted] for label in classes]
    return np.sort(np.concatenate(chosen))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seeded draw of a share of each class, to within one image, but never a class's last image.

    Args:
        labels: of all samples [N], 0 or more.
        share: of the samples, at most 0.5; one is held out even where that is less than one.
        seed: of the draw.

    Returns:
        Sample ids to train on and those held out, both ascending; none are held out where every
        class has a single image.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order = rng.permutation(len(labels))
    free = order[np.bincount(labels)[labels[order]] > 1]
    free = free[np.argsort(labels[free], kind="stable")]
    # Places at equal distances of two or more, class by class: each class gives its share, not all.
    num_held_out = min(max(1, round(share * len(free))), len(free) // 2)
    places = (np.arange(num_held_out) + rng.random()) * len(free) / max(1, num_held_out)
    held_out = np.sort(free[places.astype(np.int64)])
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def listed_samples(dataset: Images, list_file: str) -> np.ndarray:
    """Sample ids of the images that a list names, one a line (SimCLR's subsets).

    A line is a name relative to the training images, as in `n01440764/n01440764_10043.JPEG`, or
    its last part as far as that is unique, such as `n01440764_10043.JPEG` in SimCLR's lists.

    Args:
        dataset: an image folder: tars do not keep file names.
        list_file: such as SimCLR's `1percent.txt`.

    Returns:
        Sample ids [M] int64, ascending.

    Raises:
        UserError: no such list, tars, or a name that no image of the folder has, or several.
    """
    if not isinstance(dataset, FolderDataset):
        raise UserError(
            f"finetune.list={list_file} names files, which tars do not keep: give data.path the "
            "image folder, with its sub-folder train"
        )
    try:
        text = Path(list_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read finetune.list={list_file}: {error}") from None
    names = [line.strip() for line in text.split("\n") if line.strip()]
    samples_of = _name_index(dataset.names)
    found = [samples_of(name) for name in names]
    missing = [name for name, ids in zip(names, found, strict=True) if not ids]
    if missing or not names:
        raise UserError(
            f"{list_file}: {len(missing)} of {len(names)} names are no images of the training set"
            + (f", such as {missing[0]}" if missing else "")
        )
    for name, ids in zip(names, found, strict=True):
        if len(ids) > 1:
            raise UserError(
                f"{list_file}: {name} may be {dataset.names[ids[0]]} or {dataset.names[ids[1]]}: "
                "give names with their folder"
            )
    return np.unique(np.concatenate(found))


def _name_index(names: Sequence[str]) -> Callable[[str], list[int]]:
    """A look-up of the samples that a name may mean."""
    by_name = {name: number for number, name in enumerate(names)}
    by_file_name = defaultdict(list)
    for number, name in enumerate(names):
        by_file_name[name.rpartition("/")[2]].append(number)

    def samples_of(wanted: str) -> list[int]:
        wanted = wanted.removeprefix("./")
        if wanted in by_name:
            return [by_name[wanted]]
        # Folders that both names give have to agree: cat/1.jpg is not dog/1.jpg.
        return [
            number
            for number in by_file_name.get(wanted.rpartition("/")[2], [])
            if f"/{names[number]}".endswith(f"/{wanted}")
            or f"/{wanted}".endswith(f"/{names[number]}")
        ]

    return samples_of
