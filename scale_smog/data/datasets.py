"""A split of images, whether it lies in tars or in a folder."""

from pathlib import Path

from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.data.image_folder import holds_images, list_folder, split_folders
from scale_smog.data.manifest import MANIFEST_NAME, load_manifest
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.errors import UserError

Images = TarDataset | FolderDataset


def open_split(path: str | Path, split: str) -> Images:
    """Opens a split of a dataset of tars, or of a folder of images.

    A folder of images has sub-folders for its splits (`train` or `Training`, `val`, `test`), or is
    the training split itself, with a sub-folder for each class or flat.

    Raises:
        UserError: there is no such dataset or split.
    """
    if not str(path):  # which would be the current folder
        raise UserError("data.path is empty: name a folder of images, of tars, or a store's URL")
    if is_tars(path):
        return TarDataset(path, split)
    return FolderDataset(path, _sub_folder(path, split))


def has_split(path: str | Path, split: str) -> bool:
    """Whether the dataset has a split of that name.

    Raises:
        UserError: the manifest of a dataset of tars is damaged.
    """
    splits = list_splits(path)
    return split in splits or (not splits and split == "train")


def list_splits(path: str | Path) -> tuple[str, ...]:
    """The splits of a dataset; none for a folder of images that has no sub-folders for them.

    Raises:
        UserError: the manifest of a dataset of tars is damaged.
    """
    return tuple(load_manifest(path).splits if is_tars(path) else split_folders(Path(path)))


def has_labels(path: str | Path, split: str) -> bool:
    """Whether every image of a split has a label; of a folder, which is only listed, a class.

    Raises:
        UserError: there is no such dataset or split.
    """
    if is_tars(path):
        return bool((TarDataset(path, split).labels >= 0).all())
    return bool(list_folder(Path(path, _sub_folder(path, split))).classes)


def remarks(dataset: Images) -> list[str]:
    """Lines for the user on images that are left out, and on what tars would spare."""
    return dataset.notes if isinstance(dataset, FolderDataset) else []


def num_images(path: str | Path, split: str) -> int:
    """Images of a split; of a folder only listed, so that damaged ones count.

    Raises:
        UserError: there is no such dataset or split.
    """
    if is_tars(path):
        return TarDataset(path, split).num_samples
    return len(list_folder(Path(path, _sub_folder(path, split))).images)


def is_tars(path: str | Path) -> bool:
    """Whether it is a dataset of tars, perhaps an unfinished one, and not a folder of images."""
    folder = Path(path)
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists():
        return True
    begun = any(folder.glob("*.tar")) or any(folder.glob(".sharding-*"))
    return begun and not holds_images(folder)


def _sub_folder(path: str | Path, split: str) -> str:
    folders = split_folders(Path(path))
    if split in folders:
        return folders[split].name
    if split == "train" and not folders:
        return ""
    if Path(path, split).is_dir():  # a split of another name than the usual ones
        return split
    raise UserError(f"no split {split!r} in {path}; it has: {', '.join(folders) or 'train'}")
