"""CIFAR-10 as its makers publish it: cifar-10-binary.tar.gz (cs.toronto.edu/~kriz/cifar.html)."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from scale_smog.data.images import ImageEntry
from scale_smog.data.prepare.sources.source import Source, SourceOptions
from scale_smog.errors import UserError

SIDE_PX = 32
ROW_BYTES = 1 + 3 * SIDE_PX**2  # label, then red, green and blue
NAMES_FILE = "batches.meta.txt"


def cifar10_source(path: Path, options: SourceOptions) -> Source:
    """Lists the archive's data_batch_*.bin (split train) or test_batch.bin (test, val) as PNGs.

    Raises:
        UserError: the file is no such archive, or the split is another one.
    """
    kinds = {"train": "data_batch", "test": "test_batch", "val": "test_batch"}
    if options.split not in kinds:
        raise UserError(f"CIFAR-10 has the splits train and test, not {options.split}")
    classes, images, blocks = (), [], []
    with _members(path) as members:
        files = {os.path.basename(name): content for name, content in members}
    if NAMES_FILE in files:
        classes = tuple(files.pop(NAMES_FILE).decode().split())
    names = sorted(n for n in files if n.startswith(kinds[options.split]) and n.endswith(".bin"))
    for block, name in enumerate(names):
        rows = _as_rows(path, name, files[name])
        images += [
            ImageEntry(f"{name}#{i}", int(label), ROW_BYTES) for i, label in enumerate(rows[:, 0])
        ]
        blocks += [block] * len(rows)
    if not images or not classes:
        raise UserError(f"{path} is not CIFAR-10's binary archive: it has {', '.join(files)}")
    if (largest := max(image.label for image in images)) >= len(classes):
        raise UserError(f"{path}: label {largest}, but {NAMES_FILE} names {len(classes)} classes")
    return Source(classes, tuple(images), _Reader(path.absolute()), blocks=tuple(blocks))


@contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, bytes]]]:
    """Name and content of the archive's files, in its order."""
    try:
        with tarfile.open(path, "r:*") as archive:
            yield (
                (info.name, file.read())
                for info in archive
                if info.isreg() and (file := archive.extractfile(info))
            )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _as_rows(path: Path, name: str, content: bytes) -> np.ndarray:
    """[N, ROW_BYTES] uint8."""
    if len(content) % ROW_BYTES:
        raise UserError(f"{path}: {name} does not hold rows of {ROW_BYTES} bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, ROW_BYTES)


@dataclass(frozen=True)
class _Reader:
    """Unpacks the file of a row; the last one stays in memory."""

    path: Path

    def __call__(self, name: str) -> bytes:
        file, _, row = name.partition("#")
        pixels = _batch(self.path, file)[int(row), 1:].reshape(3, SIDE_PX, SIDE_PX)
        out = BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "PNG")
        return out.getvalue()


@lru_cache(maxsize=1)
def _batch(path: Path, wanted: str) -> np.ndarray:
    with _members(path) as members:
        content = next(content for name, content in members if os.path.basename(name) == wanted)
    return _as_rows(path, wanted, content)
