"""Folders of images: one sub-folder a class, or flat and unlabelled."""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from scale_smog.data.images import (
    AS_STORED,
    IMAGE_EXTENSIONS,
    BadImageError,
    EncodedImage,
    ImageEntry,
    fingerprint,
    preprocess,
)
from scale_smog.data.labels import UNLABELLED
from scale_smog.errors import UserError
from scale_smog.runtime.files import printable

NUM_ASKING, NAMES_AT_ONCE = 32, 1000  # threads, and files of one job of them
SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}


class FolderListing(NamedTuple):
    """The images of a folder, sorted by their names, and the classes that their labels index."""

    classes: tuple[str, ...]
    images: tuple[ImageEntry, ...]


@dataclass(frozen=True)
class FolderReader:
    """Reads files by their name below a folder."""

    folder: Path

    def __call__(self, name: str) -> bytes:
        try:
            with open(f"{self.folder}/{name}", "rb", buffering=0) as file:
                return file.read()
        except OSError as error:  # the disk's fault, not the image's: not a case for quarantine
            raise UserError(f"cannot read {self.folder / name}: {error.strerror}") from None


def list_folder(folder: str | Path) -> FolderListing:
    """Lists an image folder: one sub-folder per class, or a flat folder of unlabelled images.

    Classes are the sub-folders in the order of their names; below a class folder any depth will
    do. Hidden entries and links back into the folder are ignored; other files that are not images
    are counted on stderr.

    Raises:
        UserError: the folder is missing, has no images, has images beside class folders, or a
            class folder without images, or folders of splits instead of classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}" + (", it is a file" * folder.exists()))
    names, others = _list_images(folder)
    if others:
        print(f"{folder}: skipped {_counted(others, 'that are not images')}", file=sys.stderr)
    if not names:
        kinds = " ".join(sorted(IMAGE_EXTENSIONS))
        held = f"; it holds {_counted(others)}" if others else ""
        raise UserError(f"no images in {folder} (looked for {kinds}){held}")

    classes = _class_names(folder, names)
    _refuse_splits(folder, classes)
    label_of = {name: label for label, name in enumerate(classes)}
    images = tuple(
        ImageEntry(name, label_of.get(name.split("/")[0], UNLABELLED), size)
        for name, size in zip(names, _sizes(folder, names), strict=True)
    )
    return FolderListing(tuple(printable(name) for name in classes), images)


def holds_images(folder: Path) -> bool:
    """Whether there is any image in a folder, at any depth."""
    return any(_is_image(name) for _, files in _walk(folder) for name in files)


class FolderDataset:
    """One split of an image folder, `path/split/class/image`; attributes as of `TarDataset`.

    Sizes of images are read where they are asked for: opening a million files takes minutes.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        """Lists `path/split`.

        Raises:
            UserError: no such folder, or no images in it.
        """
        folder = Path(path) / split
        self.classes, images = list_folder(folder)
        self.names = [image.name for image in images]
        self.num_samples = len(self.names)
        self.num_classes = len(self.classes)
        self.labels = np.array([image.label for image in images], dtype=np.int64)
        self.widths, self.heights = _Sizes(self, "width"), _Sizes(self, "height")
        self.sha256 = fingerprint(images)
        self._read = FolderReader(folder)

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
        return preprocess(read(name), AS_STORED)
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


def _list_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Sorted names relative to `folder`, and the extensions of files that are not images."""
    names, others = [], Counter()
    for prefix, files in _walk(folder):
        for name in files:
            if _is_image(name):
                names.append(prefix + name)
            else:
                others["hidden" if name.startswith(".") else os.path.splitext(name)[1]] += 1
    return sorted(names), others


def _is_image(name: str) -> bool:
    # Hidden files are nobody's images, whatever their extension (macOS writes `._a.jpg`).
    extension = os.path.splitext(name)[1][1:].lower()
    return not name.startswith(".") and extension in IMAGE_EXTENSIONS


def _counted(kinds: Counter[str], which: str = "") -> str:
    """Such as `1,200 files (1,000 .txt, 200 .json)`."""
    most = ", ".join(f"{num:,} {kind or 'without ending'}" for kind, num in kinds.most_common(3))
    return f"{kinds.total():,} files {which}{' ' * bool(which)}({most})"


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """All folders, as the beginning of names relative to `folder`, and the files in each.

    A link to a folder is followed, unless that lies inside already: its images would come twice.
    """
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder, onerror=_raise_unlistable, followlinks=True):
        kept = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in kept if not _leads_back(parent, name, root)]
        for name in sorted(set(kept) - set(folders)):
            print(f"{parent}/{name}: skipped, a link back into the folder", file=sys.stderr)
        relative = os.path.relpath(parent, folder)
        yield ("" if relative == "." else f"{relative}/"), files


def _leads_back(parent: str, name: str, root: str) -> bool:
    """Whether a sub-folder is a link to a parent, or to where its images are listed anyway."""
    path = os.path.join(parent, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    if any(_is_inside(inner, target) for inner in (root, os.path.realpath(parent))):
        return True
    inside = os.path.relpath(target, root).split("/")
    return _is_inside(target, root) and not any(part.startswith(".") for part in inside)


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _raise_unlistable(error: OSError) -> NoReturn:
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from None


def _refuse_splits(folder: Path, classes: Sequence[str]) -> None:
    """Folders that hold the splits of a dataset are no classes.

    All are named as splits, or some as training and some as test images: a lone `train` among
    others may be a class of vehicles.
    """
    kinds = {name: _split_kind(name) for name in classes}
    splits = [name for name in classes if kinds[name]]
    if splits and (len(splits) == len(classes) or len({kinds[name] for name in splits}) > 1):
        first = folder / splits[0]
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}, which would be its classes: shard "
            f"each alone, as {first} --split {kinds[splits[0]]}"
        )


def _split_kind(name: str) -> str:
    """The split that a folder's name means, "" for none."""
    word = re.sub(r"[\W\d_]+|images?|set|data|split", "", name.casefold())
    return next((kind for kind, words in SPLIT_WORDS.items() if word in words), "")


def _class_names(folder: Path, names: list[str]) -> tuple[str, ...]:
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return ()
    if loose:
        raise UserError(f"{folder} has images beside its class folders, such as {loose[0]}")
    with_images = {name.split("/")[0] for name in names}
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    for name in folders:
        if name not in with_images:
            raise UserError(f"class folder {folder / name} has no images; fill or remove it")
    return tuple(folders)


def _sizes(folder: Path, names: Sequence[str]) -> list[int]:
    """Bytes of each; asked for side by side, as a shared file system takes its time for each."""

    def sizes(part: Sequence[str]) -> list[int]:
        return [_size(f"{folder}/{name}") for name in part]

    parts = [names[i : i + NAMES_AT_ONCE] for i in range(0, len(names), NAMES_AT_ONCE)]
    with ThreadPoolExecutor(NUM_ASKING) as threads:
        return [size for part in threads.map(sizes, parts) for size in part]


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be read without end
        raise UserError(f"{path} is no plain file, but a pipe, a socket or a device: remove it")
    return status.st_size
