"""Random access to the encoded images of a dataset of tars, on a disk or in a store."""

import hashlib
from collections.abc import Iterable
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np

from scale_smog.data.manifest import MANIFEST_NAME, ShardEntry, load_manifest, split_sha256
from scale_smog.data.remote.copies import copied
from scale_smog.data.remote.space import cache_space
from scale_smog.data.remote.tars import RemoteTars
from scale_smog.data.tar_files import LocalTars, TarIndex
from scale_smog.errors import UserError
from scale_smog.runtime.stores import Folder, Store, open_folder

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


def npy_bytes(rows: np.ndarray) -> bytes:
    """A sidecar as the content of an .npy file."""
    buffer = BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def load_sidecar(folder: Folder | Store, entry: ShardEntry) -> np.ndarray:
    """Reads one shard's sidecar: SIDECAR_DTYPE [num_samples].

    Raises:
        UserError: the sidecar is missing or is not the one the manifest describes.
    """
    try:
        content = folder.read(entry.npy_name)
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
        sha256: hex SHA-256 that names the split's content, of the manifest.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        """Opens `split` of the dataset at `path`, a folder or a store's URL.

        Raises:
            UserError: no such dataset or split, or a shard is missing or has another size.
        """
        self._split, place = split, open_folder(path)
        described = copied(place, cache_space(), split) if isinstance(place, Store) else place
        manifest = load_manifest(described.url)
        shards = manifest.split(split).shards
        if isinstance(place, Folder):
            _check_tar_sizes(place.path, shards)
        self.sha256 = split_sha256(manifest, split)
        self._index = TarIndex(shards, [load_sidecar(described, entry) for entry in shards])
        self._open(place)

        rows = self._index.rows
        self.num_samples = len(rows)
        self.shard_sizes = [entry.num_samples for entry in shards]
        self.classes = manifest.classes
        self.num_classes = len(self.classes)
        self.labels = np.ascontiguousarray(rows["label"])
        self.widths = np.ascontiguousarray(rows["width"])
        self.heights = np.ascontiguousarray(rows["height"])

    def _open(self, place: Folder | Store) -> None:
        self._place = place
        if isinstance(place, Store):
            space, name = cache_space(), f"{self._split}-{self.sha256[:16]}"
            folder = space.of_dataset(place.url) / name
            self._tars = RemoteTars(place, self._index, folder, space.limit_bytes)
        else:
            self._place = Folder(place.path.absolute())
            self._tars = LocalTars(self._place.path, self._index)

    @property
    def remote(self) -> RemoteTars | None:
        """The tars, if they are in a store."""
        return self._tars if isinstance(self._tars, RemoteTars) else None

    @property
    def tar_paths(self) -> list[str]:
        """The shards' files, in the order of their samples' ids."""
        return [f"{self._place}/{name}" for name in self._index.names]

    def at(self, path: str | Path) -> Self:
        """The same split in another copy of the dataset folder, such as another host's."""
        other = copy(self)
        other._open(open_folder(path))
        return other

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image (JPEG, PNG or WebP) of a sample.

        Raises:
            IndexError: `sample_id` is outside 0..num_samples - 1.
            UserError: the shard cannot be read, or its bytes are not those that were written.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} is outside 0..{self.num_samples - 1}")
        try:
            content = self._tars.read(sample_id)
        except OSError as error:
            tar = self._index.place(sample_id).tar
            raise UserError(f"cannot read {self._place}/{tar}: {error.strerror}") from error
        if not self._index.is_whole(sample_id, content):
            raise UserError(
                f"{self.name_of(sample_id)} (id {sample_id}) is damaged; "
                f"run data_tools/verify.py {self._place}"
            )
        return content

    def name_of(self, sample_id: int) -> str:
        """Where a sample lies, in words: its tar and its key."""
        key, tar = self._index.rows["key"][sample_id], self._index.place(sample_id).tar
        return f"{self._place}/{tar}: sample {key:012d}"


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
