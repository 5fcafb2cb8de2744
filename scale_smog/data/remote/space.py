"""Where datasets in stores may use this machine's disk."""

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

DEFAULT_FOLDER = "scale_smog_cache"  # in the folder for temporary files
GIB = 2**30


class CacheSpace(NamedTuple):
    """A folder, and how much each split may take there."""

    folder: str = ""  # "": DEFAULT_FOLDER
    gib: float = 100.0

    def of_dataset(self, url: str) -> Path:
        """The folder of one dataset."""
        base = Path(self.folder or Path(tempfile.gettempdir()) / DEFAULT_FOLDER)
        return base.absolute() / hashlib.sha256(url.encode()).hexdigest()[:16]

    @property
    def limit_bytes(self) -> int:
        """Of the images of a split."""
        return int(self.gib * GIB)


_space = CacheSpace()


def use_cache(folder: str, gib: float) -> None:
    """Sets the space for datasets that this process opens from now on."""
    global _space
    _space = CacheSpace(folder, gib)


def cache_space() -> CacheSpace:
    """The space that is in use."""
    return _space
