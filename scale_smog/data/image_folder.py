"""A dataset in its own layout, a folder of images a split, read like one of tars."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from scale_smog.data.images import BadImageError, EncodedImage, Treatment, normalise
from scale_smog.data.manifest import MANIFEST_NAME, TarDataset, load_manifest, manifest_sha256
from scale_smog.data.prepare.folder_source import FolderReader, folder_source
from scale_smog.errors import UserError

_AS_STORED = Treatment(full_check=False)


class FolderDataset:
    """One split of an image folder, `path/split/class/image`; attributes as of `TarDataset`.

    Sizes of images are read where they are asked for: opening a million files takes minutes.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        """Lists `path/split`.

        Raises:
            UserError: no such folder, or no images in it.
        """
        source = folder_source(Path(path) / split)
        self.names = [image.name for image in source.images]
        self.num_samples = len(self.names)
        self.classes = source.classes
        self.num_classes = len(self.classes)
        self.labels = np.array([image.label for image in source.images], dtype=np.int64)
        self.widths, self.heights = _Sizes(self, "width"), _Sizes(self, "height")
        self.sha256 = source.fingerprint()
        self._read = FolderReader(Path(path) / split)

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image of a sample, in a form that every loader reads alike.

        Raises:
            UserError: the file is no image.
        """
        return self.image(sample_id).content

    def image(self, sample_id: int) -> EncodedImage:
        """The encoded image with its size."""
        return _image(self._read, self.names[sample_id])


@lru_cache(maxsize=1024)  # of a batch both sizes are asked for, and then the images
def _image(read: FolderReader, name: str) -> EncodedImage:
    try:
        return normalise(read(name), _AS_STORED)
    except BadImageError as error:
        raise UserError(f"{read.folder / name} is not an image: {error}") from None


class _Sizes:
    """Widths or heights, read for the samples [B] that they are asked for."""

    def __init__(self, dataset: FolderDataset, side: str) -> None:
        self._dataset, self._side = dataset, side

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        sizes = [getattr(self._dataset.image(int(i)), self._side) for i in ids]
        return np.array(sizes, dtype=np.int32)

    def max(self) -> int:
        """The largest of all."""
        return int(self[np.arange(self._dataset.num_samples)].max())


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
