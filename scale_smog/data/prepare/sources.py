"""Sources other than image folders: CSV lists, Hugging Face parquet files, existing tars."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

from scale_smog.data.images import BadImageError
from scale_smog.data.manifest import UNLABELLED
from scale_smog.data.prepare.folder_source import FolderReader, Source, SourceImage, folder_source
from scale_smog.data.tars import list_tar
from scale_smog.errors import UserError


def open_source(source: str | Path) -> Source:
    """Finds out what kind of source it is: tars, parquet or CSV by its ending, else a folder.

    `source` may be a pattern such as `images/train-*.tar`.

    Raises:
        UserError: there is nothing of that name, or the source itself is at fault.
    """
    kinds = {".tar": tar_source, ".parquet": parquet_source, ".csv": csv_source}
    make = kinds.get(Path(source).suffix.lower())
    if make is None or Path(source).is_dir():
        return folder_source(source)
    paths = [Path(name) for name in sorted(glob(str(source)))]
    if not paths and not Path(source).exists():
        raise UserError(f"no file {source}")
    return make(paths or [Path(source)])


# -------------------------------------------------------------------------------------------- CSV


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
        SourceImage(
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


# ---------------------------------------------------------------------------------------- parquet


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
                images.append(SourceImage(name, label, len(content)))
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


# ------------------------------------------------------------------------------------------- tars


def tar_source(paths: Sequence[Path]) -> Source:
    """Lists the images of tars in the webdataset convention; what is refused is quarantined.

    Labels are the numbers in `.cls` members, and the classes' names as well.

    Raises:
        UserError: a file is no uncompressed tar, or none has an image.
    """
    images, refused = [], []
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        listing, tar = list_tar(path), path.relative_to(folder).as_posix()
        refused += [(f"{tar}#{name}", reason) for name, reason in listing.refused]
        for sample in listing.samples:
            name = f"{tar}#{sample.image.offset}.{sample.image.size}.{sample.image.name}"
            images.append(SourceImage(name, sample.label, sample.image.size))
    if not images:
        raise UserError(f"no images in {paths[0]}" + (f": {refused[0]}" if refused else ""))
    num_classes = max(image.label for image in images) + 1
    classes = tuple(str(label) for label in range(num_classes))
    return Source(classes, tuple(images), _TarReader(folder), tuple(refused))


@dataclass(frozen=True)
class _TarReader:
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
