"""A split of images, whether it lies in tars or in a folder."""

from pathlib import Path

from scale_smog.data.image_folder import FolderDataset
from scale_smog.data.manifest import MANIFEST_NAME, load_manifest, manifest_sha256
from scale_smog.data.tar_dataset import TarDataset

Images = TarDataset | FolderDataset


def open_split(path: str | Path, split: str) -> Images:
    """Opens a split of a dataset of tars, or of a folder with a sub-folder for each split.

    Raises:
        UserError: there is no such dataset or split.
    """
    return TarDataset(path, split) if _is_tars(path) else FolderDataset(path, split)


def has_split(path: str | Path, split: str) -> bool:
    """Whether the dataset has a split of that name.

    Raises:
        UserError: the manifest of a dataset of tars is damaged.
    """
    if _is_tars(path):
        return split in load_manifest(path).splits
    return (Path(path) / split).is_dir()


def split_sha256(path: str | Path, split: str) -> str:
    """Hex SHA-256 that names a split's content: of the manifest, or of names, labels and sizes."""
    if _is_tars(path):
        return manifest_sha256(path, split)
    return FolderDataset(path, split).sha256


def _is_tars(path: str | Path) -> bool:
    # A folder without a manifest and without `train` is an unfinished set of tars: say that.
    folder = Path(path)
    known = any((folder / split).is_dir() for split in ("train", "val", "test"))
    return (folder / MANIFEST_NAME).exists() or not known
