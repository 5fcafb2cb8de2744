"""A folder of images as a split, read as it lies there.

Every image is decoded once, as sharding does; what was found is kept in an index, so that later
only new and changed files are looked at.
"""

import fcntl
import hashlib
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from scale_smog.data.image_folder import list_folder
from scale_smog.data.images import (
    AS_STORED,
    BadImageError,
    ImageEntry,
    Preprocessing,
    preprocess,
)
from scale_smog.data.workers import num_usable_cores
from scale_smog.errors import UserError
from scale_smog.runtime.files import printable, write_atomically
from scale_smog.runtime.retries import retry_transient_errors

# One row an image. A width of 0: not looked at yet, of -1: no image.
INDEX_DTYPE = np.dtype(
    [
        ("size", "<i8"),  # of the file, bytes
        ("modified_ns", "<i8"),  # time of its last change
        ("width", "<i4"),  # px
        ("height", "<i4"),  # px
        ("crc32", "<u4"),  # of the file
        ("as_stored", "?"),  # whether loaders get the file's own bytes
    ]
)
CACHE_VARIABLE = "SCALE_SMOG_CACHE"
MAX_BAD = 0.05  # share of the images; more of them are a mistake
IMAGES_AT_ONCE = 20_000  # looked at between two moments for writing the index
KEEP_SHARE_FACTOR = 20  # the index is written whole: at most a twentieth of the time goes there
NUM_OPENED = 32  # images on which the time of opening is measured
SLOW_OPENING_MS = 1.0  # from here on it is worth a word
MANY_REWRITTEN = 0.1  # share of the images


class FolderDataset:
    """Random access to the images of a folder; attributes and methods as of `TarDataset`.

    A sample's id is its place among the sorted names. Instances may be shared by threads and
    pickled.

    Attributes:
        names: of the files, relative to the folder.
        num_samples: N.
        classes: names of the labels: the sub-folders; empty for a flat, unlabelled folder.
        num_classes: number of them.
        labels: int64 [N], -1 where unlabelled.
        widths: int32 [N], px.
        heights: int32 [N], px.
        shard_sizes: [N]: a folder is mixed as a whole.
        notes: lines for the user on what is left out and what tars would spare.
        sha256: hex SHA-256 over names, labels and contents' checksums.
    """

    def __init__(self, path: str | Path, sub_folder: str = "") -> None:
        """Lists the folder of a split and looks at the images that its index does not know.

        Args:
            path: of the dataset.
            sub_folder: of the split, where it has one.

        Raises:
            UserError: no such folder, no images in it, one cannot be read, or more than a
                twentieth of them are damaged.
        """
        self._sub_folder = sub_folder
        self.folder = Path(path, sub_folder).absolute()
        self.classes, listed = list_folder(Path(path, sub_folder))
        index = _Index(self.folder, listed)
        found = index.look()
        good = np.flatnonzero(found["width"] > 0)
        self.names = [listed[i].name for i in good]
        self.num_samples, self.num_classes = len(good), len(self.classes)
        self.labels = np.array([listed[i].label for i in good], dtype=np.int64)
        self._rows = found[good]
        self.widths = np.ascontiguousarray(self._rows["width"])
        self.heights = np.ascontiguousarray(self._rows["height"])
        self.shard_sizes = [self.num_samples]
        self.notes = [*index.notes, *_rewriting(self.folder, self._rows["as_stored"])]
        self.sha256 = self._content_sha256()

    def at(self, path: str | Path) -> Self:
        """The same split in another copy of the dataset, such as another host's."""
        other = copy(self)
        other.folder = Path(path, self._sub_folder).absolute()
        return other

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image (JPEG, PNG or WebP) of a sample.

        Raises:
            IndexError: `sample_id` is outside 0..num_samples - 1.
            UserError: the file cannot be read, or is another one than was looked at.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} is outside 0..{self.num_samples - 1}")
        path, row = f"{self.folder}/{self.names[sample_id]}", self._rows[sample_id]
        content = _content(path)
        if len(content) != row["size"] or zlib.crc32(content) != row["crc32"]:
            raise UserError(f"{printable(path)} has changed since this program looked at it")
        return content if row["as_stored"] else preprocess(content, AS_STORED).content

    def name_of(self, sample_id: int) -> str:
        """Where a sample lies, in words: its file."""
        return printable(f"{self.folder}/{self.names[sample_id]}")

    def _content_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, label, row in zip(self.names, self.labels, self._rows, strict=True):
            line = f"{name}\0{label}\0{row['size']}\0{row['crc32']}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class _Index:
    """What is known of the images of a folder, kept in a file of the user's cache.

    Args:
        folder: absolute.
        images: as they are listed now.
    """

    def __init__(self, folder: Path, images: Sequence[ImageEntry]) -> None:
        digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        self._path = _cache_folder() / f"{digest}.npz"
        self._folder = folder
        self._names = [image.name for image in images]
        self._listed = np.zeros(len(images), dtype=INDEX_DTYPE)
        self._listed["size"] = [image.num_bytes for image in images]
        self._listed["modified_ns"] = [image.modified_ns for image in images]
        self._reasons: dict[str, str] = {}  # of images that are none
        self.notes: list[str] = []

    def look(self) -> np.ndarray:
        """INDEX_DTYPE [N]: every image is looked at, by one process of a host.

        Raises:
            UserError: a file cannot be read, or too many are damaged.
        """
        rows = self._known()
        if not rows["width"].all():
            with _alone(self._path):
                rows = self._known()  # another process may have looked meanwhile
                self._look_at(rows)
        self._require_mostly_good(int((rows["width"] < 0).sum()))
        return rows

    def _known(self) -> np.ndarray:
        """The rows of files that have kept their size and time; the others' widths are 0."""
        rows = self._listed.copy()
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(self._path) as kept:
            names = bytes(kept["names"]).decode("utf-8", "surrogateescape").split("\0")
            place = {name: i for i, name in enumerate(names)}
            places = np.array([place.get(name, -1) for name in self._names])
            old = kept["rows"].astype(INDEX_DTYPE)[places]
            same = (places >= 0) & (old["size"] == rows["size"])
            same &= old["modified_ns"] == rows["modified_ns"]
            rows[same] = old[same]
            reasons = bytes(kept["reasons"]).decode("utf-8", "surrogateescape").split("\0")
            self._reasons = dict(zip(reasons[::2], reasons[1::2], strict=False))
        return rows

    def _look_at(self, rows: np.ndarray) -> None:
        """Fills the rows without a width, part by part: a start that is killed goes on there."""
        unknown = np.flatnonzero(rows["width"] == 0)
        if not len(unknown):
            return
        if len(unknown) > IMAGES_AT_ONCE:
            print(
                f"looking at {len(unknown):,} images of {printable(str(self._folder))}, once; a "
                "start that is ended meanwhile goes on from there",
                file=sys.stderr,
                flush=True,
            )
        self._measure_opening(unknown)
        try:
            self._look_at_parts(rows, unknown)
        finally:
            self._keep(rows)

    def _look_at_parts(self, rows: np.ndarray, unknown: np.ndarray) -> None:
        num_threads = max(16, num_usable_cores())  # decoding releases the interpreter's lock
        with (
            ThreadPoolExecutor(num_threads) as threads,
            tqdm(total=len(unknown), desc="looking at images", unit="img", disable=None) as bar,
        ):
            keep_from = 0.0
            for start in range(0, len(unknown), IMAGES_AT_ONCE):
                if start and time.monotonic() > keep_from:
                    begin = time.monotonic()
                    self._keep(rows)
                    end = time.monotonic()
                    keep_from = end + KEEP_SHARE_FACTOR * (end - begin)
                part = unknown[start : start + IMAGES_AT_ONCE]
                for i, row in zip(part, threads.map(self._row, part), strict=True):
                    rows[i] = row
                    bar.update()

    def _row(self, i: int) -> tuple[int | bool, ...]:
        """What an image is: INDEX_DTYPE."""
        content = _content(f"{self._folder}/{self._names[i]}")
        file = (len(content), int(self._listed[i]["modified_ns"]))
        try:
            image = preprocess(content, Preprocessing())
        except BadImageError as error:
            self._reasons[self._names[i]] = str(error)
            return (*file, -1, 0, 0, False)
        self._reasons.pop(self._names[i], None)  # it may have been mended
        as_stored = image.content is content
        return (*file, image.width, image.height, zlib.crc32(content), as_stored)

    def _measure_opening(self, ids: np.ndarray) -> None:
        """Notes what tars, opened once, would spare, where that is much."""
        times = []
        for i in ids[:: max(1, len(ids) // NUM_OPENED)]:
            start = time.perf_counter()
            os.close(_open(f"{self._folder}/{self._names[i]}"))
            times.append(time.perf_counter() - start)
        opening_ms = 1e3 * statistics.median(times)
        if opening_ms > SLOW_OPENING_MS:
            self.notes.append(
                f"{self._folder}: opening an image takes {opening_ms:.1f} ms; tars (smog shard) "
                "are opened once"
            )

    def _keep(self, rows: np.ndarray) -> None:
        """Writes what is known; a folder that cannot be written costs the next start's time."""
        reasons = [text for pair in self._reasons.items() for text in pair]
        buffer = BytesIO()
        np.savez(buffer, rows=rows, names=_joined(self._names), reasons=_joined(reasons))
        try:
            write_atomically(self._path, buffer.getvalue())
        except OSError as error:
            print(
                f"cannot write {self._path}: {error.strerror}; the next start looks at every image "
                f"again ({CACHE_VARIABLE} names another folder)",
                file=sys.stderr,
            )

    def _require_mostly_good(self, num_bad: int) -> None:
        if not num_bad:
            return
        bad = [name for name in self._names if name in self._reasons]
        first = printable(f"{self._folder}/{bad[0]}: {self._reasons[bad[0]]}")
        found = f"{num_bad:,} of {len(self._names):,} images are damaged, such as {first}"
        if num_bad > MAX_BAD * len(self._names):
            raise UserError(f"{found}: mend or remove them")
        self.notes.append(f"{found}; they are left out")


def _rewriting(folder: Path, as_stored: np.ndarray) -> list[str]:
    """A line where many images are of kinds that readers disagree about."""
    num = int((~as_stored).sum())
    if num <= MANY_REWRITTEN * len(as_stored):
        return []
    return [
        f"{folder}: {num:,} of {len(as_stored):,} images (CMYK, palettes, turned ...) become "
        "JPEGs at every read; for tars (smog shard) they do so once"
    ]


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scale_smog"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process in at a time, as far as the file system has locks."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _content(path: str) -> bytes:
    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    try:
        return retry_transient_errors(read, path)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None


def _joined(texts: Sequence[str]) -> np.ndarray:
    """Texts as bytes [.] uint8, divided by zeros."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)
