"""A folder of this machine, such as one of another disk, as `Store` asks fsspec for one."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from scale_smog.runtime.files import rename_durably, write_atomically


class Disk(LocalFileSystem):
    """Writes files whole or not at all, into sub-folders that come and go with them.

    Args:
        root: the folder, which stays.
    """

    cachable = False

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = Path(root)

    def pipe_file(self, path: str, value: bytes, *_: Any, **__: Any) -> None:
        """Writes a file."""
        write_atomically(_in_folder(path), value)

    def put_file(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, lpath: str, rpath: str, *_: Any, **__: Any
    ) -> None:
        """Writes a file from another."""
        path = _in_folder(rpath)
        partial = path.with_name(f".{path.name}.tmp")
        shutil.copyfile(lpath, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        rename_durably(partial, path)

    def rm_file(self, path: str) -> None:
        """Removes a file, and its sub-folder with the last one."""
        os.remove(path)
        folder = Path(path).parent
        if folder != self._root:
            with suppress(OSError):  # there are others in it
                folder.rmdir()


def _in_folder(path: str) -> Path:
    """The path, whose folder is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
