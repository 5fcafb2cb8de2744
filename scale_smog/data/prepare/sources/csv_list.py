"""Lists of image files in CSV."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from scale_smog.data.image_folder import FolderReader
from scale_smog.data.images import ImageEntry
from scale_smog.data.manifest import UNLABELLED
from scale_smog.data.prepare.sources.source import Source
from scale_smog.errors import UserError


def csv_source(paths: Sequence[Path]) -> Source:
    """Lists images named in CSV files: a column `path`, relative to the file, perhaps `label`.

    Labels are names; classes are their sorted set, as numbers where all are whole numbers.

    Raises:
        UserError: a column or a file is missing; it is named with the line.
    """
    names, labels = [], []
    for path in paths:
        with _opened(path) as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or ()):
                raise UserError(f"{path} has no column 'path'; it has {rows.fieldnames}")
            for row in rows:
                image = path.parent / (row["path"] or "")
                if not image.is_file():
                    raise UserError(f"{path}, line {rows.line_num}: no file {image}")
                names.append(str(image))
                labels.append(row.get("label") or "")
    if not names:
        raise UserError(f"{paths[0]} lists no images")
    classes = _sorted_classes(labels)
    number = {name: index for index, name in enumerate(classes)}
    folder = Path(os.path.commonpath([Path(name).parent for name in names]))
    images = tuple(
        ImageEntry(
            Path(name).relative_to(folder).as_posix(),
            number.get(label, UNLABELLED),
            Path(name).stat().st_size,
        )
        for name, label in zip(names, labels, strict=True)
    )
    return Source(classes, images, FolderReader(folder))


def _opened(path: Path):
    try:
        return open(path, newline="", encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _sorted_classes(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels) - {""}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
