"""Files that survive a crash: atomic writes, synced folders, hashes."""

import errno
import fcntl
import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LEAST_OPEN_FILES, MOST_OPEN_FILES = 16, 2**16


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `path` so that after a crash it has either its old content or all of the new one."""
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(partial, path)


def rename_durably(partial: Path, path: Path) -> None:
    """Renames an already synced file or folder to `path`, and syncs the folder of that name."""
    os.replace(partial, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, by a file beside `path` that is there as long."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "a") as file:  # NFS locks only what may be written
            with suppress(OSError):  # some network filesystems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(lock, file):  # the process before has removed it
                continue
            try:
                return (yield)
            finally:
                lock.unlink(missing_ok=True)


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS's word for it
            return False
        raise


def most_open_files() -> int:
    """How many files one reader may keep open: a quarter of what the process may open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_OPEN_FILES
    return min(max(soft // 4, LEAST_OPEN_FILES), MOST_OPEN_FILES)


def printable(name: str) -> str:
    """A file's name for JSON and the console: bytes that are not UTF-8 become escapes (`\\xe9`)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
