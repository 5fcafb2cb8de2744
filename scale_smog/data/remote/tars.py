"""Reads encoded images from tars in a store: from this machine's cache, or by a ranged request."""

import sys
import time
from pathlib import Path
from typing import Any

from scale_smog.data.remote.cache import COMING, PRESENT, ShardCache
from scale_smog.data.remote.read_ahead import Node, Plan, ReadAhead
from scale_smog.data.tar_files import TarIndex
from scale_smog.runtime.stores import Store

NUM_REREADS = 3
POLL_S, LONGEST_POLL_S = 0.002, 0.02  # of many readers that wait together
SAY_AFTER_S = 10.0
GIVE_UP_S = 120.0  # waiting for another process of this machine


class RemoteTars:
    """Images by their ids; shared by threads, and pickled.

    Args:
        store: folder of the tars.
        index: of the tars.
        folder: of the cache.
        limit_bytes: of the cache.
    """

    def __init__(self, store: Store, index: TarIndex, folder: Path, limit_bytes: int):
        self._store, self._index = store, index
        self._folder, self._limit_bytes = folder, limit_bytes
        self._cache = self._open_cache()

    def _open_cache(self) -> ShardCache | None:
        try:
            return ShardCache(self._folder, self._index)
        except OSError as error:
            print(
                f"{self._folder}: {error.strerror}: reading {self._store} without a cache; "
                "data.cache_dir names another place",
                file=sys.stderr,
            )
        return None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._cache = self._open_cache()

    def read(self, sample_id: int) -> bytes:
        """A sample's bytes; damaged ones only if the store has no others.

        Raises:
            OSError: the store does not give them.
        """
        if self._cache is not None and self._is_here(self._cache, sample_id):
            content = self._cache.read(sample_id)
            if self._index.is_whole(sample_id, content):
                return content
            self._cache.forget([sample_id])
        place = self._index.place(sample_id)
        content = b""
        for _ in range(NUM_REREADS):
            content = self._store.read(place.tar, place.offset, place.offset + place.size)
            if self._index.is_whole(sample_id, content):
                break
            say_torn(self._store, place.tar, sample_id)
        return content

    def read_ahead(self, plan: Plan, steps: range, node: Node) -> ReadAhead | None:
        """Begins to fetch what this machine will need in `steps`, this process's share of it."""
        if self._cache is None:
            return None
        return ReadAhead(
            self._store, self._index, self._cache, self._limit_bytes, plan, steps, node
        )

    def _is_here(self, cache: ShardCache, sample_id: int) -> bool:
        """Waits for a sample that another thread or process of this machine is fetching."""
        began = said = time.monotonic()
        poll_s = POLL_S
        while cache.states[sample_id] == COMING:
            time.sleep(poll_s)
            poll_s = min(1.5 * poll_s, LONGEST_POLL_S)
            now = time.monotonic()
            if now - said > SAY_AFTER_S:
                said = now
                print(
                    f"waiting for {self._store} for {now - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            if now - began > GIVE_UP_S:
                break
        return cache.states[sample_id] == PRESENT


def say_torn(store: Store, tar: str, sample_id: int) -> None:
    """A line on bytes that are not those that were written."""
    print(
        f"{store}/{tar}: sample {sample_id} came damaged (crc32); reading it again",
        file=sys.stderr,
        flush=True,
    )
