"""Where the encoded images of a split lie in its tars, and how they are read from a local disk."""

import os
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scale_smog.data.manifest import ShardEntry
from scale_smog.runtime.files import most_open_files
from scale_smog.runtime.retries import retry_transient_errors


class Place(NamedTuple):
    """An encoded image."""

    tar: str  # its file name
    offset: int  # bytes
    size: int  # bytes


class TarIndex:
    """Names of the tars, and where each of N samples lies in them.

    Attributes:
        names: of the tars, in the order of their samples' ids.
        first_ids: of each tar, and N.
        rows: SIDECAR_DTYPE [N].
    """

    def __init__(self, shards: Sequence[ShardEntry], sidecars: Sequence[np.ndarray]):
        self.names = [entry.name for entry in shards]
        self.first_ids = list(accumulate((len(rows) for rows in sidecars), initial=0))
        self.rows = np.concatenate(sidecars)

    def shard(self, sample_id: int) -> int:
        """Number of the tar that holds a sample."""
        return bisect_right(self.first_ids, sample_id) - 1

    def place(self, sample_id: int) -> Place:
        """Where a sample lies."""
        row = self.rows[sample_id]
        return Place(self.names[self.shard(sample_id)], int(row["offset"]), int(row["size"]))

    def is_whole(self, sample_id: int, content: bytes) -> bool:
        """Whether these are the bytes that were written."""
        row = self.rows[sample_id]
        return len(content) == row["size"] and zlib.crc32(content) == row["crc32"]


class LocalTars:
    """Reads encoded images from tars in a folder; shared by threads, pickled, and forked."""

    def __init__(self, folder: Path, index: TarIndex):
        self._folder, self._index = folder, index
        self._open = lru_cache(maxsize=most_open_files())(partial(_OpenFile, folder))

    def read(self, sample_id: int) -> bytes:
        """A sample's bytes, as they lie there.

        Raises:
            OSError: the tar cannot be read.
        """
        place = self._index.place(sample_id)

        def read() -> bytes:
            try:
                return self._open(place.tar).read(place.size, place.offset)
            except OSError:
                self._open.cache_clear()  # its descriptor may be of no use any more
                raise

        return retry_transient_errors(read, f"{self._folder}/{place.tar}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(maxsize=most_open_files())(partial(_OpenFile, self._folder))


class _OpenFile:
    """A file that closes when its last user lets go: an eviction cannot close it under a reader.

    It is found by its name: to join a path at every image would cost more than to read the image.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._descriptor = os.open(folder / name, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)
