"""Parquet files with encoded images, as Hugging Face datasets have them."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from scale_smog.data.images import ImageEntry
from scale_smog.data.labels import number_labels
from scale_smog.data.prepare.sources.source import Source, SourceOptions
from scale_smog.errors import UserError

# Usual names, in the order in which they are tried.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "category", "target")


class _Row(NamedTuple):
    """One row of a file."""

    group: int  # of rows, in the file
    number: int  # in the group
    content: bytes | None  # of the image; None: not in the file
    path: str  # that the file names in place of the content
    label: Any  # a number, a name or None


def parquet_source(paths: Sequence[Path], options: SourceOptions) -> Source:
    """Lists parquet files: images are encoded bytes, alone or in a struct, as Hugging Face has it.

    A label is a whole number, negative or null for none, or a name. Class names come from the
    files' own description, else they are the numbers. The files are read twice, to list the images
    and to shard them; as a row group is only read as a whole, a shard takes its images from few.

    Raises:
        UserError: pyarrow is missing, a file has no such columns, or a label is none.
    """
    folder, names = Path(os.path.commonpath([path.absolute().parent for path in paths])), None
    images, labels, blocks, bad, num_blocks, column_of = [], [], [], [], 0, {}
    for path in paths:
        file = _parquet_file(path)
        columns = _Columns.of(path, file.schema_arrow.names, options)
        own_names = _class_label_names(file.schema_arrow.metadata or {}, columns.label)
        if names and own_names and names != own_names:
            raise UserError(f"{path} and {paths[0]} name other classes: shard them one by one")
        names = names or own_names
        place = path.absolute().relative_to(folder).as_posix()
        column_of[place] = columns.image
        for row in _rows(path, file, columns):
            name = f"{place}#{row.group}.{row.number}"
            if row.content is None:
                bad.append((name, f"no bytes, only the path {row.path!r}"))
                continue
            images.append((name, len(row.content)))
            labels.append(row.label)
            blocks.append(num_blocks + row.group)
        num_blocks += file.num_row_groups
    if not images:
        why = f": {bad[0][1]}: store the images in the files" if bad else ""
        raise UserError(f"{paths[0]} holds no images{why}")
    classes, numbers = number_labels(labels, names or (), [name for name, _ in images])
    entries = tuple(
        ImageEntry(name, number, size) for (name, size), number in zip(images, numbers, strict=True)
    )
    return Source(classes, entries, _RowReader(folder, column_of), tuple(bad), blocks=tuple(blocks))


class _Columns(NamedTuple):
    """Which ones hold what."""

    image: str
    label: str  # "": none

    @classmethod
    def of(cls, path: Path, names: Sequence[str], options: SourceOptions) -> "_Columns":
        """The columns that are named, else those of the usual names.

        Raises:
            UserError: there is no such column.
        """

        def find(named: str, usual: Sequence[str]) -> str:
            if named and named not in names:
                raise UserError(f"{path} has no column {named!r}; it has {', '.join(names)}")
            return named or next((name for name in usual if name in names), "")

        image = find(options.image_column, IMAGE_COLUMNS)
        if not image:
            raise UserError(
                f"{path} has no column {' or '.join(map(repr, IMAGE_COLUMNS))}; it has "
                f"{', '.join(names)}: name it by --image-column"
            )
        return cls(image, find(options.label_column, LABEL_COLUMNS))


def _rows(path: Path, file: Any, columns: _Columns) -> Iterator[_Row]:
    """All rows of a file.

    Raises:
        UserError: a column is of another type, or the file is damaged.
    """
    _check_types(path, file.schema_arrow, columns)
    for group in range(file.num_row_groups):
        with _readable(path):
            table = file.read_row_group(group, [name for name in columns if name])
        labels = table[columns.label].to_pylist() if columns.label else [None] * len(table)
        number = 0
        for chunk in table[columns.image].chunks:  # not combined: may be beyond 2 GiB together
            for image in chunk:
                content, place = _image(image.as_py())
                yield _Row(group, number, content, place, labels[number])
                number += 1


def _image(value: Any) -> tuple[bytes | None, str]:
    """Content and path of an image column's value; without both, an empty file."""
    if not isinstance(value, dict):
        return value or b"", ""
    content, path = value.get("bytes"), value.get("path")
    return (None, path) if content is None and path else (content or b"", "")


def _check_types(path: Path, schema: Any, columns: _Columns) -> None:
    from pyarrow import types

    column = f"{path}: column {columns.image!r}"
    kind = schema.field(columns.image).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "bytes" not in fields:
            raise UserError(f"{column} has no 'bytes'; it has {', '.join(fields)}")
        kind = fields["bytes"]
    if not (_is_binary(kind) or types.is_null(kind)):
        raise UserError(f"{column} is {kind}, not the bytes of an encoded image")
    kind = schema.field(columns.label).type if columns.label else None
    if kind is not None and types.is_nested(kind):
        column = f"{path}: column {columns.label!r}"
        raise UserError(f"{column} is {kind}, not one number or name an image")


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _parquet_file(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet sources need pyarrow: pip install pyarrow") from None
    with _readable(path):
        return parquet.ParquetFile(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from None


def _class_label_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Names of the classes that Hugging Face's description of a file has; () for none."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
        names = described["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


@dataclass(frozen=True)
class _RowReader:
    """Reads images by file, row group and row; the last row group stays in memory."""

    folder: Path
    column_of: dict[str, str]  # file: its column of images

    def __call__(self, name: str) -> bytes:
        file, _, place = name.rpartition("#")
        group, row = map(int, place.split("."))
        column = _row_group(self.folder / file, self.column_of[file], group)
        content, _ = _image(column[row].as_py())
        return content or b""


@lru_cache(maxsize=1)
def _row_group(path: Path, column: str, group: int) -> Any:
    with _readable(path):
        return _parquet_file(path).read_row_group(group, [column])[column]
