"""Which labels a classifier learns from: SimCLR's lists, balanced draws, held-out images."""

from pathlib import Path

import numpy as np

from scale_smog.data.image_folder import FolderDataset, Images
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
    """Sample ids to train on and those held out, a balanced share of all; both ascending."""
    held_out = balanced_subset(labels, share, seed)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def listed_samples(dataset: Images, list_file: str) -> np.ndarray:
    """Sample ids of the images whose file names a list holds, one a line (SimCLR's subsets).

    Args:
        dataset: an image folder: tars do not keep file names.
        list_file: such as SimCLR's `1percent.txt`, with lines like `n01440764_10043.JPEG`.

    Returns:
        Sample ids [M] int64, ascending.

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
