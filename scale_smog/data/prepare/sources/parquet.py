"""Parquet files with encoded images, as Hugging Face datasets have them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

from scale_smog.data.images import ImageEntry
from scale_smog.data.manifest import UNLABELLED
from scale_smog.data.prepare.sources.source import Source
from scale_smog.errors import UserError


def parquet_source(paths: Sequence[Path]) -> Source:
    """Lists Hugging Face parquet files: `image` is a struct with `bytes`, `label` a whole number.

    Class names come from the files' own description, else they are the numbers. All images are
    copied to a temporary file, for which TMPDIR needs room: a shuffled shard takes its images from
    nearly every row group, and a row group is only read as a whole.

    Raises:
        UserError: pyarrow is missing, a file has no such columns, or TMPDIR has no room.
    """
    spool = _Spool()
    images, labels, names = [], [], None
    for path in paths:
        file = _parquet_file(path)
        columns = file.schema_arrow
        if "image" not in columns.names:
            raise UserError(f"{path} has no column 'image'; it has {', '.join(columns.names)}")
        names = names or _class_label_names(columns.metadata or {})
        has_label = "label" in columns.names
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["image", "label"] if has_label else ["image"])
            contents = table["image"].combine_chunks().field("bytes")
            own = table["label"].to_pylist() if has_label else [UNLABELLED] * len(contents)
            for row, (content, label) in enumerate(zip(contents, own, strict=True)):
                label = UNLABELLED if label is None else label
                labels.append(label)
                content = content.as_py() or b""
                offset = spool.append(content)
                name = f"{path.name}#{group}.{row}#{offset}.{len(content)}"
                images.append(ImageEntry(name, label, len(content)))
    if not images:
        raise UserError(f"{paths[0]} holds no images")
    classes = names or tuple(str(label) for label in range(max(labels) + 1))
    return Source(classes, tuple(images), spool)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet sources need pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from None


def _class_label_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    label = described.get("info", {}).get("features", {}).get("label", {})
    return tuple(label.get("names", ()))


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
