"""Streams tars that have no index, from https:, object stores or a pipe, through webdataset.

It gives up what needs random access. The other loaders keep these promises, this one does not:

- A pass shows every sample of every tar once, but ranks share whole tars, so that a rank with
  small ones begins its next pass earlier. There must be at least one tar a rank.
- Order is that of shuffled tars through a buffer of SHUFFLE_BUFFER samples.
- A resumed run begins a new pass with another order and other augmentation; another number of
  ranks changes both as well. Between a start and a stop everything repeats to the bit, unless a
  connection broke.
- Image sizes and labels come from the tars as they pass; no hash is checked.

Views are sampled and made by the same code as in the torch loader.
"""

import random
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BufferedReader, RawIOBase
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.filters import shuffle
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from scale_smog.data.batch import Batch
from scale_smog.data.images import AS_STORED, IMAGE_EXTENSIONS, BadImageError, preprocess
from scale_smog.data.labels import UNLABELLED, label_of
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.prefetch import prefetch
from scale_smog.data.loaders.torch import decode
from scale_smog.data.pixels import empty_views, make_views, on_device
from scale_smog.data.tars import LABEL_EXTENSION, reason_to_refuse, split_name
from scale_smog.errors import UserError
from scale_smog.runtime.stores import Store, shown

SHUFFLE_BUFFER = 1000  # encoded samples a rank keeps
SCHEMES = ("http", "https", "s3", "gs", "az", "hf", "pipe")
RANGE_BYTES = 4 * 2**20  # of a request to a store
NUM_TRIES = 3  # to read a tar
PREFETCH_BATCHES = 2
LARGEST_BAD_SHARE = 0.05  # of the samples so far, beyond the first hundred bad ones


class StreamSample(NamedTuple):
    """One sample as it left a tar."""

    name: str  # of the tar and the sample
    epoch: int  # tells one pass from another
    encoded: bytes
    label: int


def shard_urls(pattern: str, allow_pipe: bool) -> list[str]:
    """The tars that a pattern such as `https://host/train-{000000..000146}.tar` stands for.

    Raises:
        UserError: a scheme is unknown, or is `pipe:`, which runs a command, and not allowed.
    """
    urls = expand_urls(pattern)
    for url in urls:
        scheme = url.partition(":")[0].lower()
        if scheme not in SCHEMES:
            raise UserError(f"data.stream: {shown(url)} is none of {', '.join(SCHEMES)}")
        if scheme == "pipe" and not allow_pipe:
            raise UserError(
                f"data.stream: {shown(url)} runs a command; if you trust it, set "
                "data.allow_pipe=true"
            )
    return urls


class StreamLoader:
    """Batches of `steps` from tars elsewhere.

    Args:
        urls: of the tars, in any order; the same on all ranks.
        source: kinds of views, seed and ranks; of its plan only the size of a batch counts.
        steps: how many batches; the first one's number chooses the order.
        threads: that decode and make views.
        device: where the batches go.

    Raises:
        UserError: fewer tars than ranks. While loading: a tar cannot be read, or too many of its
            images.
    """

    def __init__(
        self,
        urls: Sequence[str],
        source: BatchSource,
        steps: range,
        threads: int,
        device: torch.device,
    ):
        if len(urls) < source.world_size:
            raise UserError(
                f"data.stream names {len(urls)} tars, fewer than {source.world_size} ranks"
            )
        self._urls = sorted(urls)
        self._source = source
        self._steps = steps
        self._threads = max(1, threads)
        self._device = device
        self._num_read = self._num_bad = 0

    def __iter__(self) -> Iterator[Batch]:
        mixed = shuffle(SHUFFLE_BUFFER, rng=random.Random(self._source.seed))(self._passes())
        threads = ThreadPoolExecutor(
            self._threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        with threads, closing(mixed) as samples:
            yield from prefetch(
                lambda _: self._make(samples, threads), self._steps, PREFETCH_BATCHES
            )

    def _passes(self) -> Iterator[StreamSample]:
        """This rank's samples, pass after pass, without end."""
        for epoch in count(self._steps.start):
            urls = list(self._urls)
            random.Random(f"{self._source.seed} {epoch}").shuffle(urls)
            before = self._num_read
            own = urls[self._source.rank :: self._source.world_size]
            for url in own:
                for sample in read_tar(url, epoch):
                    self._num_read += 1
                    yield sample
            if self._num_read == before:
                raise UserError(f"data.stream: no images in {', '.join(map(shown, own))}")

    def _make(self, samples: Iterator[StreamSample], threads: ThreadPoolExecutor) -> Batch:
        source, size = self._source, self._source.batch_size
        taken: list[tuple[StreamSample, Tensor]] = []
        while len(taken) < size:
            tried = list(islice(samples, size - len(taken)))
            if not tried:  # a batch ahead has met an error, which the loop will see first
                raise UserError("data.stream: closed")
            images = threads.map(self._decode, tried)
            taken += [(s, x) for s, x in zip(tried, images, strict=True) if x is not None]
        ids = np.array([zlib.crc32(sample.name.encode()) for sample, _ in taken])
        epochs = np.array([sample.epoch for sample, _ in taken])
        heights, widths = np.array([image.shape[1:] for _, image in taken]).T
        params = [v.sample(source.seed, ids, epochs, widths, heights) for v in source.views]
        outputs = empty_views(source.views, size, pinned=self._device.type == "cuda")

        def make_views_of(row: int) -> None:
            make_views(taken[row][1], row, source.views, params, outputs)

        list(threads.map(make_views_of, range(size)))
        views = [view.to(self._device, non_blocking=True) for view in outputs]
        label = on_device(np.array([sample.label for sample, _ in taken]), self._device)
        return Batch.from_views(source.views, views, label, torch.from_numpy(ids))

    def _decode(self, sample: StreamSample) -> Tensor | None:
        """[3, H, W] uint8; None, and a word on stderr, if it is no image."""
        try:
            image = preprocess(sample.encoded, AS_STORED)
            return decode(np.frombuffer(image.content, dtype=np.uint8))
        except (BadImageError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            print(f"left out: {shown(sample.name)}: {reason}", file=sys.stderr)
        self._num_bad += 1
        if self._num_bad > 100 + LARGEST_BAD_SHARE * self._num_read:
            last = shown(sample.name)
            raise UserError(f"data.stream: {self._num_bad} bad images, the last: {last}")
        return None


def read_tar(url: str, epoch: int = 0) -> Iterator[StreamSample]:
    """The samples of one tar; after a broken connection it is opened again and goes on.

    Only images and labels are read, as bytes: nothing is decoded by its extension, so a pickle
    stays what it is. On stderr: every link, device and path that leaves the tar, and the first
    member of every other extension.

    Raises:
        UserError: the tar could not be read to its end in NUM_TRIES tries.
    """
    num_done, refused = 0, set()
    for attempt in range(NUM_TRIES):
        try:
            for sample in islice(_samples(url, refused), num_done, None):
                num_done += 1
                if (usable := _image_and_label(sample)) is not None:
                    yield StreamSample(f"{url}#{sample['__key__']}", epoch, *usable)
            return
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            if attempt == NUM_TRIES - 1:
                reason = shown(str(error).partition("\n")[0])
                raise UserError(f"data.stream: cannot read {shown(url)}: {reason}") from None
            print(f"{shown(url)}: broken after {num_done} samples, trying again", file=sys.stderr)


def _image_and_label(sample: dict[str, Any]) -> tuple[bytes, int] | None:
    """The image of a sample and its label; None, and a word on stderr, if that is not clear."""
    images = [extension for extension in sample if extension in IMAGE_EXTENSIONS]
    try:
        if len(images) > 1:
            raise ValueError(f"its key has {len(images)} images")
        text = sample.get(LABEL_EXTENSION)
        label = UNLABELLED if text is None else label_of(text.decode("ascii", "backslashreplace"))
    except ValueError as error:
        name = f"{shown(sample['__url__'])}#{sample['__key__']}"
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None
    return (sample[images[0]], label) if images else None


def _samples(url: str, refused: set[str]) -> Iterator[dict[str, Any]]:
    """Samples as webdataset groups them: bytes by extension, and `__key__`."""
    with _open(url) as stream:
        files = _files(stream, url, refused)
        yield from group_by_keys(({**file, "__url__": url} for file in files), handler=_name)
        # To the end: a program that writes to nobody may call that a failure.
        rest = iter(lambda: stream.read(2**16), b"")
        if sum(bool(block.strip(b"\0")) for block in rest):
            print(f"{shown(url)}: what follows the end of its tar is not read", file=sys.stderr)


def _files(stream: Any, url: str, refused: set[str]) -> Iterator[dict[str, Any]]:
    """Images and labels of a tar as it passes; what is refused is named on stderr.

    webdataset's own iterator passes over links and devices in silence.
    """
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for info in tar:
            extension = split_name(info)[1].extension.lower()
            reason = reason_to_refuse(info, extension)
            if reason and reason not in refused:
                if info.isreg() and "path" not in reason:  # name the first of a kind only
                    refused.add(reason)
                print(f"{shown(url)}: left out {info.name}: {reason}", file=sys.stderr)
            elif not reason and extension in IMAGE_EXTENSIONS | {LABEL_EXTENSION}:
                content = tar.extractfile(info)
                yield {"fname": info.name, "data": content.read() if content else b""}
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # grows without end


def _name(error: Exception) -> bool:
    """Names a member that has the key and extension of another; True: webdataset goes on."""
    if isinstance(error, ValueError):
        print(f"left out: {error.args[0]}", file=sys.stderr)
    return isinstance(error, ValueError)


def _open(url: str) -> Any:
    """A tar as a stream of bytes; webdataset's own of servers that may know no ranges."""
    if url.partition(":")[0].lower() in ("http", "https", "pipe"):
        return gopen(url)
    folder, _, name = url.rpartition("/")
    return BufferedReader(_StoredFile(Store(folder), name), RANGE_BYTES)


class _StoredFile(RawIOBase):
    """A file of a store from its start to its end, a range ahead; what breaks is one range."""

    def __init__(self, store: Store, name: str):
        size = store.size(name)
        if size is None:
            raise FileNotFoundError(f"{store} has no {name}")

        def read(start: int) -> bytes:
            return store.read(name, start, min(start + RANGE_BYTES, size))

        self._blocks = prefetch(read, range(0, size, RANGE_BYTES), 1)
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(next(self._blocks, b""))
        num = min(len(buffer), len(self._block))
        buffer[:num] = self._block[:num]
        self._block = self._block[num:]
        return num

    def close(self) -> None:
        self._blocks.close()
        super().close()
