"""Parquet files with encoded images, as Hugging Face datasets have them."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, NamedTuple

from scale_smog.data.images import ImageEntry
from scale_smog.data.labels import (
    UNLABELLED,
    clean_names,
    label_of,
    numbered_classes,
    sorted_classes,
)
from scale_smog.data.prepare.sources.source import Source
from scale_smog.errors import UserError


class _Row(NamedTuple):
    """One row of a file."""

    name: str  # of the file and the row
    content: bytes | None  # of the image; None: not in the file
    path: str  # that the file names in place of the content
    label: Any  # a number, a name or None


def parquet_source(paths: Sequence[Path]) -> Source:
    """Lists parquet files: `image` is encoded bytes, alone or in a struct, as Hugging Face has it.

    `label` is a whole number, negative or null for none, or a name. Class names come from the
    files' own description, else they are the numbers. All images are copied to a temporary file,
    for which TMPDIR needs room: a shuffled shard takes its images from nearly every row group, and
    a row group is only read as a whole.

    Raises:
        UserError: pyarrow is missing, a file has no such columns, a label is none, or TMPDIR has
            no room.
    """
    spool, names = _Spool(), None
    images, labels, bad = [], [], []
    for path in paths:
        file = _parquet_file(path)
        own_names = _class_label_names(file.schema_arrow.metadata or {})
        if names and own_names and names != own_names:
            raise UserError(f"{path} and {paths[0]} name other classes: shard them one by one")
        names = names or own_names
        for row in _rows(path, file):
            if row.content is None:
                bad.append((row.name, f"no bytes, only the path {row.path!r}"))
                continue
            place = f"{row.name}#{spool.append(row.content)}.{len(row.content)}"
            images.append((place, len(row.content)))
            labels.append(row.label)
    if not images:
        why = f": {bad[0][1]}: store the images in the files" if bad else ""
        raise UserError(f"{paths[0]} holds no images{why}")
    classes, numbers = _numbered(labels, names or (), [name for name, _ in images])
    entries = tuple(
        ImageEntry(name, number, size) for (name, size), number in zip(images, numbers, strict=True)
    )
    return Source(classes, entries, spool, tuple(bad))


def _numbered(
    labels: list[Any], names: tuple[str, ...], images: Sequence[str]
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and each label's index into them.

    Raises:
        UserError: a label is neither a whole number nor a name, or has no name.
    """
    if any(isinstance(label, str) for label in labels):
        texts = clean_names("" if label is None else str(label) for label in labels)
        classes = sorted_classes(texts)
        number = {name: index for index, name in enumerate(classes)}
        return classes, [number.get(text, UNLABELLED) for text in texts]
    numbers = []
    for image, label in zip(images, labels, strict=True):
        try:
            if label is None or label != label:  # pandas writes nan for no number
                numbers.append(UNLABELLED)
            else:
                numbers.append(label_of(label))
        except ValueError as error:
            raise UserError(f"{image.rpartition('#')[0]}: {error}") from None
    largest = max(numbers)
    if names and largest >= len(names):
        image = images[numbers.index(largest)].rpartition("#")[0]
        raise UserError(f"{image}: label {largest}, but the file names {len(names)} classes")
    return names or numbered_classes(largest + 1), numbers


def _rows(path: Path, file: Any) -> Iterator[_Row]:
    """All rows of a file.

    Raises:
        UserError: a column is missing or of another type, or the file is damaged.
    """
    columns = [name for name in ("image", "label") if name in file.schema_arrow.names]
    _check_types(path, file.schema_arrow)
    for group in range(file.num_row_groups):
        with _readable(path):
            table = file.read_row_group(group, columns)
        labels = table["label"].to_pylist() if "label" in columns else [None] * len(table)
        row = 0
        for chunk in table["image"].chunks:  # not combined: together they may be beyond 2 GiB
            for image in chunk:
                content, place = _image(image.as_py())
                yield _Row(f"{path.name}#{group}.{row}", content, place, labels[row])
                row += 1


def _image(value: Any) -> tuple[bytes | None, str]:
    """Content and path of an image column's value; without both, an empty file."""
    if not isinstance(value, dict):
        return value or b"", ""
    content, path = value.get("bytes"), value.get("path")
    return (None, path) if content is None and path else (content or b"", "")


def _check_types(path: Path, schema: Any) -> None:
    from pyarrow import types

    if "image" not in schema.names:
        raise UserError(f"{path} has no column 'image'; it has {', '.join(schema.names)}")
    kind = schema.field("image").type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "bytes" not in fields:
            raise UserError(f"{path}: column 'image' has no 'bytes'; it has {', '.join(fields)}")
        kind = fields["bytes"]
    if not (_is_binary(kind) or types.is_null(kind)):
        raise UserError(f"{path}: column 'image' is {kind}, not the bytes of an encoded image")
    kind = schema.field("label").type if "label" in schema.names else None
    if kind is not None and types.is_nested(kind):
        raise UserError(f"{path}: column 'label' is {kind}, not one number or name an image")


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


def _class_label_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Names of the classes that Hugging Face's description of a file has; () for none."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
        names = described["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


class _Spool:
    """A temporary file of images, which workers read by their names' last part.

    It has no name, so that it ends with this process however that ends; until then workers, which
    get a copy of this object without the open file, find it at `path`.
    """

    def __init__(self):
        self._file = TemporaryFile()
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        self._size = 0

    def append(self, content: bytes) -> int:
        """Where it begins."""
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot copy images to {gettempdir()}: {error.strerror}") from None
        self._size += len(content)
        return self._size - len(content)

    def __call__(self, name: str) -> bytes:
        offset, size = map(int, name.rpartition("#")[2].split("."))
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}
