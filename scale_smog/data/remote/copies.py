"""Manifest and sidecars of a dataset in a store, read once a machine and start."""

import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scale_smog.data.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    ShardEntry,
    parse_manifest,
)
from scale_smog.data.remote.space import CacheSpace
from scale_smog.errors import UserError
from scale_smog.runtime.files import locked, write_atomically
from scale_smog.runtime.stores import Folder, Store

START_S = 60.0  # ranks of a machine start within that time of one another
NUM_READERS = 16
NUM_TRIES = 4  # to read bytes that are those the manifest describes
UNLISTED = ("http", "https")  # there a folder has no list of its files


def copied(store: Store, space: CacheSpace, split: str) -> Store | Folder:
    """A folder of this machine with manifest and sidecars of `split`, as they are in the store.

    The store itself, where this machine's disk does not take them.

    Raises:
        UserError: the manifest is missing or damaged, or the store has other tars.
    """
    folder = space.of_dataset(store.url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / MANIFEST_NAME):
            shards = _copy_manifest(store, folder).split(split).shards
            with ThreadPoolExecutor(NUM_READERS) as readers:
                list(readers.map(lambda entry: _copy_sidecar(store, folder, entry), shards))
    except OSError:
        return store  # whatever it is that fails is said where it is read
    return Folder(folder)


def _copy_manifest(store: Store, folder: Path) -> DatasetManifest:
    path = folder / MANIFEST_NAME
    if path.exists() and abs(time.time() - path.stat().st_mtime) < START_S:
        return parse_manifest(path.read_bytes(), str(path))
    content = store.read(MANIFEST_NAME)
    manifest = parse_manifest(content, f"{store}/{MANIFEST_NAME}")
    check_tars(store, manifest)
    write_atomically(path, content)
    return manifest


def _copy_sidecar(store: Store, folder: Path, entry: ShardEntry) -> None:
    path = folder / entry.npy_name

    def is_right(content: bytes) -> bool:
        return hashlib.sha256(content).hexdigest() == entry.npy_sha256

    if path.exists() and is_right(path.read_bytes()):
        return
    content = b""
    for _ in range(NUM_TRIES):
        content = store.read(entry.npy_name)
        if is_right(content):
            break
        print(f"{store}/{path.name} came damaged; reading it again", file=sys.stderr, flush=True)
    write_atomically(path, content)  # it is compared again where it is loaded


def check_tars(store: Store, manifest: DatasetManifest) -> None:
    """Compares the sizes of all tars, where the store lists them.

    Raises:
        UserError: one is missing, or has another size.
    """
    if store.url.partition("://")[0] in UNLISTED:
        return
    sizes = store.sizes("*.tar")
    for entry in [entry for split in manifest.splits.values() for entry in split.shards]:
        if entry.name not in sizes:
            raise UserError(f"shard {entry.name} is missing from {store}")
        if sizes[entry.name] != entry.bytes:
            raise UserError(
                f"shard {entry.name} in {store} has {sizes[entry.name]} bytes, {MANIFEST_NAME} "
                f"says {entry.bytes}: copy it again"
            )
