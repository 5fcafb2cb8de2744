"""Lists of source images: where sharding finds what to write."""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from scale_smog.data.manifest import UNLABELLED
from scale_smog.errors import UserError

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
NUM_ASKING, NAMES_AT_ONCE = 32, 1000  # threads, and files of one job of them
SPLIT_NAMES = frozenset({"train", "val", "test"})


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image as its source lists it."""

    name: str  # relative to the source: part of the fingerprint and of the quarantine list
    label: int  # index into the source's classes, or -1
    num_bytes: int  # at the source; only plans the shards


@dataclass(frozen=True)
class Source:
    """A list of images and how to read one; another kind of input is another such list.

    `read` maps an image's name to its encoded bytes. It runs in worker processes, so it must
    pickle.
    """

    classes: tuple[str, ...]
    images: tuple[SourceImage, ...]
    read: Callable[[str], bytes]
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason): straight to the quarantine list

    def fingerprint(self) -> str:
        """Hex SHA-256 over names, labels and sizes: tells one source from another cheaply."""
        digest = hashlib.sha256()
        for image in self.images:
            line = f"{image.name}\0{image.label}\0{image.num_bytes}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


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


def folder_source(folder: str | Path) -> Source:
    """Lists an image folder: one sub-folder per class, or a flat folder of unlabelled images.

    Classes are the sub-folders in the order of their names; below a class folder any depth will
    do. Hidden entries are ignored; other files that are not images are counted on stderr.

    Raises:
        UserError: the folder is missing, has no images, has images beside class folders, or a
            class folder without images, or folders of splits instead of classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}" + (", it is a file" * folder.exists()))
    names, num_skipped = _list_images(folder)
    if num_skipped:
        print(f"{folder}: skipped {num_skipped:,} files that are not images", file=sys.stderr)
    if not names:
        kinds = " ".join(sorted(extension[1:] for extension in IMAGE_EXTENSIONS))
        raise UserError(f"no images in {folder} (looked for {kinds})")

    classes = _class_names(folder, names)
    if classes and SPLIT_NAMES.issuperset(classes):
        raise UserError(
            f"{folder} holds the splits {', '.join(classes)}, which would be its classes: shard "
            f"each alone, as {folder / classes[0]} --split {classes[0]}"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    images = tuple(
        SourceImage(name, label_of.get(name.split("/")[0], UNLABELLED), size)
        for name, size in zip(names, _sizes(folder, names), strict=True)
    )
    return Source(classes, images, FolderReader(folder))


def _list_images(folder: Path) -> tuple[list[str], int]:
    """Sorted names relative to `folder`, and the number of files that are not images."""
    names, num_skipped = [], 0
    for parent, folders, files in os.walk(folder, onerror=_raise_unlistable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        for name in files:
            # Hidden files are nobody's images, whatever their extension (macOS writes `._a.jpg`).
            extension = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and extension in IMAGE_EXTENSIONS:
                names.append(prefix + name)
            else:
                num_skipped += 1
    return sorted(names), num_skipped


def _raise_unlistable(error: OSError) -> NoReturn:
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from None


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
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
