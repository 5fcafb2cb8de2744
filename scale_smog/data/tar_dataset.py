"""Random access to the encoded images of a dataset of tars."""

import hashlib
import os
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from copy import copy
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from scale_smog.data.manifest import MANIFEST_NAME, ShardEntry, load_manifest
from scale_smog.errors import UserError
from scale_smog.runtime.retries import retry_transient_errors

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


def npy_bytes(rows: np.ndarray) -> bytes:
    """A sidecar as the content of an .npy file."""
    buffer = BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


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

    def at(self, path: str | Path) -> Self:
        """The same split in another copy of the dataset folder, such as another host's."""
        other = copy(self)
        other._folder = Path(path).absolute()
        return other

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
