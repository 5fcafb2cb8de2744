"""The dataset contract: what a folder of shards holds, and how a sample is read from it.

A dataset folder holds, for every split, `{split}-%06d.tar` shards, a DALI index (`.idx`) and a
sidecar (`.npy`) beside each, and `{split}-quarantine.jsonl`. One `manifest.json` describes all
splits. It is written last, so a folder that has one is complete.
"""

import hashlib
import json
import os
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, write_atomically
from scale_smog.runtime.retries import retry_transient_errors

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
UNLABELLED = -1

# One row per sample, in the order of the tar. Byte order is fixed: files travel between machines.
SIDECAR_DTYPE = np.dtype(
    [
        ("key", "<i8"),  # number in the member's name; has gaps where images were put aside
        ("offset", "<i8"),  # of the encoded image inside the tar, bytes
        ("size", "<i8"),  # of the encoded image, bytes
        ("width", "<i4"),  # px
        ("height", "<i4"),  # px
        ("label", "<i8"),  # index into classes, or -1
        ("crc32", "<u4"),  # of the encoded image
    ]
)

MAX_OPEN_FILES = 256  # of a rank: a quarter of what a process may usually open


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Model):
    """One shard as the manifest lists it."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    npy_sha256: str

    @property
    def idx_name(self) -> str:
        """File name of the DALI index."""
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def npy_name(self) -> str:
        """File name of the sidecar."""
        return self.name.removesuffix(".tar") + ".npy"

    def mismatched_files(self, folder: Path) -> list[str]:
        """Names of this shard's files that are missing from `folder` or have another hash."""
        expected = {
            self.name: self.sha256,
            self.idx_name: self.idx_sha256,
            self.npy_name: self.npy_sha256,
        }
        return [
            name
            for name, sha256 in expected.items()
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256
        ]


class SplitManifest(_Model):
    """One split: how it was made and the shards it consists of, in the order of sample ids."""

    seed: int
    options: dict[str, int | None]
    source_fingerprint: str
    num_samples: int
    shards: tuple[ShardEntry, ...]


class Manifest(_Model):
    """All splits of a dataset folder. `classes[label]` is a label's name."""

    format_version: int
    classes: tuple[str, ...]
    splits: dict[str, SplitManifest]

    def split(self, name: str) -> SplitManifest:
        """Returns the split `name`.

        Raises:
            UserError: there is no such split; the message lists those there are.
        """
        if name not in self.splits:
            raise UserError(f"no split {name!r} in the dataset; it has: {', '.join(self.splits)}")
        return self.splits[name]


class Member(NamedTuple):
    """One file inside a tar."""

    extension: str
    offset: int  # of the content, bytes
    size: int  # of the content, bytes
    name: str


def format_index(samples: Sequence[Sequence[Member]]) -> bytes:
    """The DALI index (v1.2) of a tar, byte for byte what DALI's own `wds2idx` writes."""
    lines = [
        " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members)
        for members in samples
    ]
    return "\n".join([f"v1.2 {len(samples)}", *lines, ""]).encode()


def npy_bytes(rows: np.ndarray) -> bytes:
    """A sidecar as the content of an .npy file."""
    buffer = BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of `folder`; from then on its splits count as complete."""
    write_atomically(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")


def load_manifest(path: str | Path) -> Manifest:
    """Reads the manifest of the dataset folder `path`.

    Raises:
        UserError: the folder is missing, has no manifest, or one of another format version.
    """
    content = _manifest_bytes(Path(path))
    file = Path(path) / MANIFEST_NAME
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields.get("format_version")
    except (ValueError, AttributeError):
        raise UserError(f"{file} is not a manifest: it holds no JSON object") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {version!r}, this version of scale_smog reads "
            f"{FORMAT_VERSION}; write the dataset anew with data_tools/shard.py"
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} is damaged at {key}: {first['msg']}") from None


def manifest_sha256(path: str | Path, split: str = "train") -> str:
    """Hex SHA-256 that names the content of one split of the dataset folder `path` exactly.

    Other splits may come and go without a change of it.

    Raises:
        UserError: the folder is missing, has no manifest or no such split.
    """
    manifest = load_manifest(path)
    described = manifest.model_copy(update={"splits": {split: manifest.split(split)}})
    return hashlib.sha256(described.model_dump_json().encode()).hexdigest()


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UserError(
            f"no dataset folder {folder}: data.path=FOLDER names one that data_tools/shard.py made"
        )
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: unfinished or foreign; run data_tools/shard.py"
        ) from None


def load_sidecar(folder: Path, entry: ShardEntry) -> np.ndarray:
    """Reads one shard's sidecar: SIDECAR_DTYPE [num_samples].

    Raises:
        UserError: the sidecar is missing or is not the one the manifest describes.
    """
    try:
        content = (folder / entry.npy_name).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{entry.npy_name} is missing from {folder}") from None
    if hashlib.sha256(content).hexdigest() != entry.npy_sha256:
        raise UserError(f"{entry.npy_name} in {folder} is not the one {MANIFEST_NAME} describes")
    rows = np.load(BytesIO(content))
    if rows.dtype != SIDECAR_DTYPE or len(rows) != entry.num_samples:
        raise UserError(f"{entry.npy_name} in {folder} does not hold {entry.num_samples} samples")
    return rows


class TarDataset:
    """Random access to the encoded images of one split.

    A sample's id is its row number in the concatenated sidecars, 0..num_samples - 1. Instances
    may be shared by threads, pickled, and carried over a fork.

    Attributes:
        num_samples: N.
        classes: names of the labels; empty for an unlabelled dataset.
        num_classes: number of them.
        labels: int64 [N], -1 where unlabelled.
        widths: int32 [N], px.
        heights: int32 [N], px.
        shard_sizes: samples of each shard.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        """Opens `split` of the dataset folder `path`.

        Raises:
            UserError: no such dataset or split, or a shard is missing or has another size.
        """
        manifest = load_manifest(path)
        shards = manifest.split(split).shards
        self._folder = Path(path).absolute()
        self._names = [entry.name for entry in shards]
        self.shard_sizes = [entry.num_samples for entry in shards]
        self._first_ids = list(accumulate(self.shard_sizes, initial=0))
        _check_tar_sizes(self._folder, shards)
        self._rows = np.concatenate([load_sidecar(self._folder, entry) for entry in shards])

        self.num_samples = len(self._rows)
        self.classes = manifest.classes
        self.num_classes = len(self.classes)
        self.labels = np.ascontiguousarray(self._rows["label"])
        self.widths = np.ascontiguousarray(self._rows["width"])
        self.heights = np.ascontiguousarray(self._rows["height"])
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(_OpenFile)

    @property
    def tar_paths(self) -> list[str]:
        """The shards' files, in the order of their samples' ids."""
        return [str(self._folder / name) for name in self._names]

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image (JPEG, PNG or WebP) of a sample.

        Raises:
            IndexError: `sample_id` is outside 0..num_samples - 1.
            UserError: the shard cannot be read, or its bytes are not those that were written.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} is outside 0..{self.num_samples - 1}")
        shard = self._names[bisect_right(self._first_ids, sample_id) - 1]
        row = self._rows[sample_id]
        try:
            content = self._content(self._folder / shard, int(row["size"]), int(row["offset"]))
        except OSError as error:
            raise UserError(f"cannot read {self._folder / shard}: {error.strerror}") from error
        if len(content) != row["size"] or zlib.crc32(content) != row["crc32"]:
            raise UserError(
                f"{shard}: sample {row['key']:012d} (id {sample_id}) is damaged; "
                f"run data_tools/verify.py {self._folder}"
            )
        return content

    def _content(self, path: Path, size: int, offset: int) -> bytes:
        """Bytes of a shard."""

        def read() -> bytes:
            try:
                return self._open(path).read(size, offset)
            except OSError:
                self._open.cache_clear()  # its descriptor may be of no use any more
                raise

        return retry_transient_errors(read, path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(_OpenFile)


class _OpenFile:
    """A file that closes when its last user lets go: an eviction cannot close it under a reader."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)


def _check_tar_sizes(folder: Path, shards: Iterable[ShardEntry]) -> None:
    for entry in shards:
        try:
            size = (folder / entry.name).stat().st_size
        except FileNotFoundError:
            raise UserError(f"shard {entry.name} is missing from {folder}") from None
        if size != entry.bytes:
            raise UserError(
                f"shard {entry.name} in {folder} has {size} bytes, {MANIFEST_NAME} says "
                f"{entry.bytes}: copy it again"
            )
