"""Lists of image files in CSV."""

import csv
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scale_smog.data.image_folder import FolderReader
from scale_smog.data.images import ImageEntry
from scale_smog.data.labels import UNLABELLED, clean_names, sorted_classes
from scale_smog.data.prepare.sources.source import Source, SourceOptions
from scale_smog.errors import UserError

_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class _Columns(NamedTuple):
    """Where they stand in a line."""

    num: int
    path: int
    label: int | None


class _Row(NamedTuple):
    """One line of a list."""

    image: Path
    size: int  # bytes
    label: str  # "": none


def csv_source(paths: Sequence[Path], _options: SourceOptions) -> Source:
    """Lists images named in CSV files: a column `path`, relative to the file, perhaps `label`.

    Labels are names; classes are their sorted set, by value where all are numbers. Blanks around
    names count for nothing. No label, or -1: unlabelled.

    Raises:
        UserError: a column or a file is missing, or a line is not CSV; it is named.
    """
    rows = [row for path in paths for row in _rows(path)]
    if not rows:
        raise UserError(f"{paths[0]} lists no images")
    labels = clean_names(row.label for row in rows)
    classes = sorted_classes(labels)
    number = {name: index for index, name in enumerate(classes)}
    folder = Path(os.path.commonpath([row.image.parent for row in rows]))
    images = tuple(
        ImageEntry(
            row.image.relative_to(folder).as_posix(),
            number.get(label, UNLABELLED),
            row.size,
        )
        for row, label in zip(rows, labels, strict=True)
    )
    return Source(classes, images, FolderReader(folder))


def _rows(path: Path) -> Iterator[_Row]:
    """The rows of one file.

    Raises:
        UserError: as above.
    """
    line = 1
    try:
        with open(path, newline="", encoding=_encoding(path)) as file:
            lines = csv.reader(file, skipinitialspace=True)
            columns = _columns(path, next(lines, []))
            for fields in lines:
                line = lines.line_num
                if any(field.strip() for field in fields):
                    yield _row(path, line, columns, fields)
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {line}: not CSV ({error}): is a quote left open?"
        ) from None
    except UnicodeError as error:
        raise UserError(
            f"{path}, after line {line}: not UTF-8 ({error}): save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    marks = [name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)]
    if b"\0" in start and not marks:
        raise UserError(f"{path} is not UTF-8, it holds zero bytes: save it as UTF-8")
    return marks[0] if marks else "utf-8"


def _columns(path: Path, header: list[str]) -> _Columns:
    """Where `path` and `label` are.

    Raises:
        UserError: there is no `path`, or one of them twice.
    """
    names = [name.strip().casefold() for name in header]
    twice = [name for name in ("path", "label") if names.count(name) > 1]
    if "path" not in names or twice:
        fault = f"the column {twice[0]!r} twice" if twice else "no column 'path'"
        raise UserError(f"{path} has {fault}; it has {', '.join(header) or 'no header'}")
    if "label" in names:
        return _Columns(len(names), names.index("path"), names.index("label"))
    if len(names) > 1:
        print(f"{path}: no column 'label' among {', '.join(header)}: no labels", file=sys.stderr)
    return _Columns(len(names), names.index("path"), None)


def _row(path: Path, line: int, columns: _Columns, fields: list[str]) -> _Row:
    if any(field.strip() for field in fields[columns.num :]):
        raise UserError(
            f"{path}, line {line}: {len(fields)} fields under {columns.num} columns: put names "
            "with commas in quotes"
        )
    fields = fields + [""] * columns.num
    name = fields[columns.path]
    label = "" if columns.label is None else fields[columns.label]
    folder = path.absolute().parent
    for spelling in (name, name.strip()):
        if (size := _file_size(folder / spelling)) is not None:
            return _Row(folder / spelling, size, label)
    hint = "; folders are divided by /" if "\\" in name else ""
    raise UserError(f"{path}, line {line}: no file {path.parent / name.strip()}{hint}")


def _file_size(path: Path) -> int | None:
    """Bytes; None: no file. One look at it: a list has millions, often on a network's disk."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
