"""Which images an evaluation trains on: published lists, balanced shares, held-out images."""

from pathlib import Path

import numpy as np

from scale_smog.data import EpochPlan
from scale_smog.data.image_folder import FolderDataset, Images, has_split
from scale_smog.errors import UserError


class SubsetPlan(EpochPlan):
    """The order of a training on some samples of a dataset.

    Args:
        sample_ids: [N] int64, the samples to train on.
        batch: samples of one step over all ranks.
        seed: of the order.
    """

    def __init__(self, sample_ids: np.ndarray, batch: int, seed: int):
        super().__init__(len(sample_ids), batch, seed)
        self._sample_ids = sample_ids

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids [B] int64 of one rank at one step."""
        return self._sample_ids[super().ids(step, rank, world_size)]


def test_split(path: str) -> str:
    """The split to test on: "test", else "val".

    Raises:
        UserError: the dataset has neither.
    """
    for name in ("test", "val"):
        if has_split(path, name):
            return name
    raise UserError(f"{path} has no split 'test' or 'val' to evaluate on")


def require_labels(dataset: Images, path: str, purpose: str) -> None:
    """Raises a UserError unless every image has a label."""
    if (dataset.labels < 0).any():
        raise UserError(f"{purpose} needs labels, and {path} has images without one")


def require_same_classes(train: Images, test: Images, path: str) -> None:
    """Raises a UserError unless both splits name the same classes."""
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise UserError(
            f"{path}: the classes of the training and the test images do not match: {odd[0]}"
            + f" and {len(odd) - 1} more" * (len(odd) > 1)
        )


def balanced_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
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
    rng = np.random.Generator(np.random.PCG64(seed))
    order = rng.permutation(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    # As many of each class as the mean class gives: the lists of SimCLR are as even.
    wanted = max(1, round(share * len(labels) / len(classes)))
    own = [order[labels[order] == label][:wanted] for label in classes[counts > 0]]
    return np.sort(np.concatenate(own))


def random_subset(num_samples: int, num_wanted: int) -> np.ndarray:
    """A draw of so many sample ids, ascending, the same each time; 0 or too many wanted: all."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(num_samples)
    return np.sort(order[: num_wanted or None])  # no prefix: a folder's images come by class


def held_out_share(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids to train on and those kept back, a balanced share of all."""
    kept = balanced_share(labels, share, seed)
    return np.setdiff1d(np.arange(len(labels)), kept), kept


def listed_samples(dataset: Images, list_file: str) -> np.ndarray:
    """Sample ids of the images whose file names a list holds, one a line (SimCLR's subsets).

    Args:
        dataset: an image folder: tars do not keep file names.
        list_file: such as SimCLR's `1percent.txt`, with lines like `n01440764_10043.JPEG`.

    Raises:
        UserError: no such list, tars, or a name that the folder does not have.
    """
    if not isinstance(dataset, FolderDataset):
        raise UserError(
            f"finetune.list={list_file} names files, which tars do not keep: give data.path the "
            "image folder, with its sub-folder train"
        )
    try:
        lines = Path(list_file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read finetune.list={list_file}: {error}") from None
    ids = {name.rpartition("/")[2]: number for number, name in enumerate(dataset.names)}
    missing = [name for name in lines if name.rpartition("/")[2] not in ids]
    if missing or not lines:
        raise UserError(
            f"{list_file}: {len(missing)} of {len(lines)} names are no images of the training set"
            + (f", such as {missing[0]}" if missing else "")
        )
    return np.unique([ids[name.rpartition("/")[2]] for name in lines])
