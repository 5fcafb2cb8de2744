"""Images of a split on a local disk, shared by all processes of a machine.

Each tar has a sparse file here with its bytes at their own offsets, and each sample a byte that
says whether its bytes are there. No reader takes a lock: what it reads is compared with the
sample's checksum, so a byte that is wrong, after a crash or beside an eviction, costs one more
request.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from scale_smog.data.tar_files import TarIndex
from scale_smog.runtime.files import most_open_files

ABSENT, COMING, PRESENT = 0, 1, 2
STRIPE_BYTES = 8 * 2**20  # of a tar: what one process of a machine fetches and removes
_KEEP_SIZE_PUNCH_HOLE = 1 | 2  # of fallocate(2)
_LIBC = ctypes.CDLL(None, use_errno=True)


class ShardCache:
    """Images by their ids, under a limit that the processes share.

    May be used by threads.

    Args:
        folder: of this split; made if missing.
        index: of its tars.

    Attributes:
        states: uint8 [N], the same memory in all processes: ABSENT, COMING or PRESENT.
        extents: int64 [N], bytes from each sample to the next one of its tar.
        stripes: int64 [N], number of the stripe that each sample begins in.
        remover: who has removed samples last, of those of this process that do.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, index: TarIndex):
        self._folder, self._index = folder, index
        folder.mkdir(parents=True, exist_ok=True)
        offsets = index.rows["offset"].astype(np.int64)
        self.extents = np.append(offsets[1:], 0) - offsets
        last = np.array(index.first_ids[1:], dtype=np.int64) - 1
        self.extents[last] = 0
        np.maximum(self.extents, index.rows["size"], out=self.extents)
        self._tars = np.repeat(np.arange(len(index.names)), np.diff(index.first_ids))
        self.stripes = self._tars + offsets // STRIPE_BYTES
        self.remover: object | None = None
        self._attach()

    def _attach(self) -> None:
        path = self._folder / "states"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # All of it is on the disk before it is mapped: a write to a full disk would be SIGBUS.
            os.posix_fallocate(descriptor, 0, max(1, len(self._index.rows)))
        finally:
            os.close(descriptor)
        # As a plain array: a memmap's own indexing takes ten times as long.
        self.states = np.asarray(np.memmap(path, np.uint8, "r+", shape=(len(self._index.rows),)))
        self._open = lru_cache(maxsize=most_open_files())(_SparseFile)
        self._is_writable = True

    @property
    def is_writable(self) -> bool:
        """False after a write has failed: what is there stays readable."""
        return self._is_writable

    def forget_unfinished(self, mask: np.ndarray) -> None:
        """Of `mask` bool [N]: what was on its way when an earlier run ended never came."""
        self.states[mask & (self.states == COMING)] = ABSENT

    def read(self, sample_id: int) -> bytes:
        """A sample's bytes; any other bytes if it is not there, or being removed."""
        place = self._index.place(sample_id)
        try:
            return self._open(self._folder / place.tar).read(place.size, place.offset)
        except OSError:
            return b""

    def write(self, tar: str, offset: int, content: bytes, sample_ids: np.ndarray) -> None:
        """Writes bytes of a tar, and marks these samples in it as there."""
        try:
            if self._is_writable:
                self._open(self._folder / tar).write(content, offset)
                self.states[sample_ids] = PRESENT
        except OSError as error:
            self._is_writable = False
            print(
                f"{self._folder}: {error.strerror}: the cache takes no more, images come from the "
                "store as they are needed; mend data.cache_dir or lower data.cache_gib",
                file=sys.stderr,
                flush=True,
            )
        if not self._is_writable:
            self.forget(sample_ids)

    def forget(self, sample_ids: Sequence[int] | np.ndarray) -> None:
        """Marks samples as not there."""
        self.states[sample_ids] = ABSENT

    def num_bytes(self, mask: np.ndarray) -> int:
        """Of the samples of `mask` bool [N] that are there or coming."""
        return int(self.extents[mask & (self.states != ABSENT)].sum())

    def remove(self, sample_ids: np.ndarray) -> None:
        """Gives the disk the space of samples back, whole blocks of it."""
        self.forget(sample_ids)
        # Holes reach to the neighbours that stay, so that blocks shared with others go too.
        gone = self.states == ABSENT
        same = (np.diff(self.stripes) == 0) & (np.diff(self._tars) == 0)
        begins = np.flatnonzero(~np.append(False, gone[1:] & gone[:-1] & same))
        ends = np.append(begins[1:], len(gone)) - 1
        offsets = self._index.rows["offset"]
        for run in np.unique(np.searchsorted(begins, sample_ids, "right") - 1):
            start, stop = offsets[begins[run]], offsets[ends[run]] + self.extents[ends[run]]
            with suppress(OSError):
                file = self._open(self._folder / self._index.names[self._tars[begins[run]]])
                file.punch(int(start), int(stop - start))


class _SparseFile:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def write(self, content: bytes, offset: int) -> None:
        view = memoryview(content)
        while view:
            num = os.pwrite(self._descriptor, view, offset)
            view, offset = view[num:], offset + num

    def punch(self, offset: int, size: int) -> None:
        arguments = (ctypes.c_int64(offset), ctypes.c_int64(size))
        if _LIBC.fallocate(self._descriptor, _KEEP_SIZE_PUNCH_HOLE, *arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
