"""Tars that others made as sources."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_smog.data.images import BadImageError, ImageEntry
from scale_smog.data.labels import number_labels
from scale_smog.data.prepare.sources.source import Source, SourceOptions
from scale_smog.data.tars import TarListing, list_tar
from scale_smog.errors import UserError

MAX_JSON_BYTES = 2**20  # of a description; captions are shorter


def tar_source(paths: Sequence[Path], options: SourceOptions) -> Source:
    """Lists the images of tars in the webdataset convention; what is left out is listed.

    Labels are the numbers in `.cls` members, and the classes' names as well; or numbers or names
    under `label_key` in the `.json` members.

    Raises:
        UserError: a file is no uncompressed tar, or none has an image.
    """
    images, labels, bad, extra = [], [], [], []
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    for path in paths:
        listing, tar = list_tar(path), path.absolute().relative_to(folder).as_posix()
        bad += [(f"{tar}#{name}", reason) for name, reason in listing.bad]
        extra += [(f"{tar}#{name}", reason) for name, reason in listing.extra]
        for sample in listing.samples:
            name = f"{tar}#{sample.image.offset}.{sample.image.size}.{sample.image.name}"
            images.append((name, sample.image.size))
        key = options.label_key
        labels += _json_labels(path, listing, key) if key else [x.label for x in listing.samples]
    if not images:
        raise UserError(f"no images in {paths[0]}{_why_none(bad, extra)}")
    if options.label_key and all(label is None for label in labels):
        raise UserError(f"no .json member of {paths[0]} has a key {options.label_key!r}")
    classes, numbers = number_labels(labels, (), [name for name, _ in images])
    entries = (
        ImageEntry(name, number, size) for (name, size), number in zip(images, numbers, strict=True)
    )
    return Source(classes, tuple(entries), TarReader(folder), tuple(bad), tuple(extra))


def _why_none(bad: Sequence[tuple[str, str]], extra: Sequence[tuple[str, str]]) -> str:
    if any(name.endswith(".tar") for name, _ in extra):
        return ": it holds tars; ImageNet's are read by --layout imagenet, others unpack first"
    return f"; {bad[0][0]}: {bad[0][1]}" if bad else ""


def _json_labels(path: Path, listing: TarListing, key: str) -> list[Any]:
    """What the samples' descriptions have under a key; None where there is none."""
    labels = []
    with open(path, "rb") as file:
        for sample in listing.samples:
            found = None
            for member in sample.members:
                if member.extension.lower() == "json" and member.size <= MAX_JSON_BYTES:
                    file.seek(member.offset)
                    found = _json_value(file.read(member.size), key)
            labels.append(found)
    return labels


def _json_value(content: bytes, key: str) -> Any:
    try:
        value = json.loads(content).get(key)
    except (ValueError, AttributeError):  # no JSON, or no object
        return None
    return value if isinstance(value, int | float | str) else None


@dataclass(frozen=True)
class TarReader:
    """Reads parts of files by `file#offset.size.name`."""

    folder: Path

    def __call__(self, name: str) -> bytes:
        file, _, place = name.partition("#")
        offset, size, _ = place.split(".", 2)
        try:
            with open(self.folder / file, "rb") as tar:
                tar.seek(int(offset))
                content = tar.read(int(size))
        except OSError as error:
            raise UserError(f"cannot read {self.folder / file}: {error.strerror}") from None
        if len(content) < int(size):
            raise BadImageError("truncated: the tar ends inside it")
        return content
