"""Folders of images: one sub-folder a class, or flat and unlabelled."""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from scale_smog.data.images import IMAGE_EXTENSIONS, ImageEntry
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
        ImageEntry(name, label_of.get(name.split("/")[0], UNLABELLED), *status)
        for name, status in zip(names, _statuses(folder, names), strict=True)
    )
    return FolderListing(tuple(printable(name) for name in classes), images)


def holds_images(folder: Path) -> bool:
    """Whether there is any image in a folder, at any depth."""
    return any(_is_image(name) for _, files in _walk(folder) for name in files)


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


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> its sub-folder, such as {"train": pictures/Training}; {} where there are none.

    All sub-folders with images are named as splits, or some as training and some as test images:
    a lone `train` among others may be a class of vehicles.

    Raises:
        UserError: two folders may be the same split.
    """
    names = _sub_folders(folder)
    if not any(split_kind(name) for name in names):
        return {}
    found: dict[str, Path] = {}
    for name in _splits_among(name for name in names if holds_images(folder / name)):
        kind = split_kind(name)
        if kind in found and found[kind].name != kind and name != kind:
            raise UserError(
                f"{found[kind]} and {folder / name} may both be the split {kind}: name one {kind}"
            )
        if kind not in found or name == kind:
            found[kind] = folder / name
    return {kind: found[kind] for kind in SPLIT_WORDS if kind in found}


def _sub_folders(folder: Path) -> list[str]:
    """Names in order; of a million files none is asked for its kind."""
    try:
        with os.scandir(folder) as entries:
            return sorted(each.name for each in entries if each.name[0] != "." and each.is_dir())
    except OSError as error:
        _raise_unlistable(error)


def _splits_among(names: Iterable[str]) -> list[str]:
    """Those of the names of sub-folders that are splits, [] where classes may have such names."""
    kinds = {name: split_kind(name) for name in names}
    splits = [name for name in kinds if kinds[name]]
    are_splits = len(splits) == len(kinds) or len({kinds[name] for name in splits}) > 1
    return splits if are_splits else []


def _refuse_splits(folder: Path, classes: Sequence[str]) -> None:
    """Folders that hold the splits of a dataset are no classes."""
    if splits := _splits_among(classes):
        first = folder / splits[0]
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}, which would be its classes: shard "
            f"each alone, as {first} --split {split_kind(splits[0])}"
        )


def split_kind(name: str) -> str:
    """The split that a name means, such as "val" for "Validation images"; "" for none."""
    word = re.sub(r"[\W\d_]+|images?|set|data|split", "", name.casefold())
    return next((kind for kind, words in SPLIT_WORDS.items() if word in words), "")


def _class_names(folder: Path, names: list[str]) -> tuple[str, ...]:
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return ()
    if loose:
        raise UserError(f"{folder} has images beside its class folders, such as {loose[0]}")
    with_images = {name.split("/")[0] for name in names}
    folders = _sub_folders(folder)
    for name in folders:
        if name not in with_images:
            raise UserError(f"class folder {folder / name} has no images; fill or remove it")
    return tuple(folders)


def _statuses(folder: Path, names: Sequence[str]) -> list[tuple[int, int]]:
    """Bytes and time of the last change, in ns, of each; asked for side by side, as a shared file
    system takes its time for each."""

    def statuses(part: Sequence[str]) -> list[tuple[int, int]]:
        return [_status(f"{folder}/{name}") for name in part]

    parts = [names[i : i + NAMES_AT_ONCE] for i in range(0, len(names), NAMES_AT_ONCE)]
    with ThreadPoolExecutor(NUM_ASKING) as threads:
        return [status for part in threads.map(statuses, parts) for status in part]


def _status(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be read without end
        raise UserError(f"{path} is no plain file, but a pipe, a socket or a device: remove it")
    return status.st_size, status.st_mtime_ns
