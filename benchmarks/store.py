"""Training images from an object store against the same tars on the disk, in images a second.

    python benchmarks/store.py [--quick] [--latencies 0 5 20 50] [--mosaic FOLDER] [--price]

A server on this machine stands for the store: it speaks as much of S3 as reading needs, sends
100 MB/s a connection, and lets every request wait for a latency. It has a core of its own, and what
reads has the others, from the disk too. Views and workers are the same everywhere. The time that
cores worked for an image stands beside the rate, for machines that do other things meanwhile.
Peers read the same images, decoded as by our torch loader: webdataset from URLs, and MosaicML's
streaming (installed into FOLDER, with `pip install --target`) from its own format; webdataset with
torchvision's decoding and views too. `reading alone` decodes nothing. With `--price` it counts what
an epoch of ImageNet-1k would cost instead.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import torch
from compare import claim
from loader import PillowViews
from PIL import Image

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.images import ImageEntry
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_plan, build_training_loader
from scale_smog.data.loaders.torch import decode
from scale_smog.data.manifest import ShardEntry
from scale_smog.data.pixels import empty_views, make_views
from scale_smog.data.prepare.shard import shard_source
from scale_smog.data.prepare.sources import Source
from scale_smog.data.remote import read_ahead
from scale_smog.data.remote.cache import PRESENT, ShardCache
from scale_smog.data.remote.read_ahead import Node, Range, ReadAhead
from scale_smog.data.remote.space import GIB, use_cache
from scale_smog.data.tar_dataset import SIDECAR_DTYPE
from scale_smog.data.tar_files import TarIndex
from scale_smog.runtime.stores import Store as StoreClient

CPU = torch.device("cpu")
BATCH = 32
CORES = sorted(os.sched_getaffinity(0))
OURS, OF_SERVER = CORES[:-1] or CORES, CORES[-1:]
WORKERS = len(OURS)
BUCKET = "bucket"
BYTES_PER_S = 100e6  # of a connection
VIEWS = training_views(DataConfig(path=""), AugmentConfig())
# Amazon S3 Standard, us-east-1: $0.0004 for 1,000 GET requests; reading within the region is free
# (aws.amazon.com/s3/pricing).
DOLLARS_A_GET = 0.0004 / 1000
PART = 40  # of ImageNet is counted
IMAGENET = (1_281_167, 110_000)  # images, mean bytes


class Store(multiprocessing.Process):
    """The server, in a process of its own."""

    def __init__(self, folder: Path, latency_s: float):
        super().__init__(daemon=True)
        self.folder, self.latency_s = folder, latency_s
        self.port = multiprocessing.Value("i", 0)

    def __enter__(self) -> "Store":
        self.start()
        while not self.port.value:
            time.sleep(0.01)
        os.environ |= {"AWS_ENDPOINT_URL": self.url, "S3_ENDPOINT_URL": self.url}
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()
        self.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port.value}"

    def counts(self) -> tuple[int, int]:
        """Requests and bytes since this was asked last."""
        with urllib.request.urlopen(f"{self.url}/counts") as answer:
            return tuple(json.load(answer))

    def run(self) -> None:
        os.sched_setaffinity(0, OF_SERVER)
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.num_requests = self.num_bytes = 0
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head.split(" ", 2)
        if target == "/counts":
            content = json.dumps([self.num_requests, self.num_bytes]).encode()
            self.num_requests = self.num_bytes = 0
            return writer.write(_headers(200, len(content)) + content)
        self.num_requests += 1
        await asyncio.sleep(self.latency_s)
        parts = urlsplit(target)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").strip("/")
        if "list-type" in parts.query:
            content = self._list(parse_qs(parts.query).get("prefix", [""])[0])
            return writer.write(_headers(200, len(content)) + content)
        path = self.folder / key
        if not key or not path.is_file():
            return writer.write(_headers(404, 0))
        size = path.stat().st_size
        found = re.search(r"(?im)^range: bytes=(\d+)-(\d*)", head)
        start = int(found[1]) if found else 0
        stop = min(size, int(found[2]) + 1) if found and found[2] else size
        more = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n" if found else ""
        more += 'ETag: "0"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
        writer.write(_headers(206 if found else 200, stop - start, more))
        if method == "GET":
            self.num_bytes += stop - start
            await self._send(path, start, stop, writer)

    async def _send(self, path: Path, start: int, stop: int, writer: asyncio.StreamWriter) -> None:
        began, sent = time.monotonic(), 0
        with open(path, "rb") as file:
            file.seek(start)
            while sent < stop - start:
                block = file.read(min(2**18, stop - start - sent))
                writer.write(block)
                await writer.drain()
                sent += len(block)
                await asyncio.sleep(max(0, began + sent / BYTES_PER_S - time.monotonic()))

    def _list(self, prefix: str) -> bytes:
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        keys = [(str(p.relative_to(self.folder)), p.stat().st_size) for p in files]
        listed = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>0</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in keys
            if key.startswith(prefix)
        )
        return (
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
        ).encode()


def _headers(status: int, size: int, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} -\r\nContent-Length: {size}\r\n{more}\r\n".encode()


def _picture(name: str) -> bytes:
    """A JPEG of 500 x 375 px and about ImageNet's mean size."""
    rng = np.random.default_rng(int(name))
    coarse = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_tars(folder: Path, num_images: int) -> None:
    """A dataset of tars of fifty images."""
    images = tuple(ImageEntry(str(i), i % 10, 110_000) for i in range(num_images))
    source = Source(tuple("0123456789"), images, _picture)
    shard_source(source, folder, shard_samples=50, full_check=False)


class Rate(NamedTuple):
    """What an epoch took."""

    images_per_s: float
    core_ms: float = 0.0  # an image
    num_requests: int = 0
    num_mb: float = 0.0


def core_seconds() -> float:
    """Of this process and the workers that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(
    batches: Iterable[object], num_images: int, store: Store | None = None, start: bool = True
) -> Rate:
    """Images a second from the first request on, or without the start: after the first batch."""
    if store:
        store.counts()
    began, used_s, num = time.monotonic(), core_seconds(), 0
    for num, _ in enumerate(batches, start):
        if not start and not num:
            began, used_s = time.monotonic(), core_seconds()
    num *= BATCH
    seconds, used_s = time.monotonic() - began, core_seconds() - used_s
    assert num >= num_images - 2 * BATCH, num
    requests, num_bytes = store.counts() if store else (0, 0)
    return Rate(num / seconds, 1000 * used_s / num, requests, num_bytes / 1e6)


def ours(dataset: TarDataset, order: str, loader: str = "dali") -> Iterator[object]:
    """An epoch."""
    data = DataConfig(
        path="",
        loader=loader,  # pyright: ignore[reportArgumentType]
        device="cpu",
        workers=WORKERS,
        global_batch=BATCH,
        order=order,  # pyright: ignore[reportArgumentType]
        block_shards=4,
    )
    plan = build_plan(data, dataset, 0)
    steps = range(dataset.num_samples // BATCH)
    yield from build_training_loader(data, VIEWS, dataset, plan, steps, CPU)


def reading(dataset: TarDataset) -> Iterator[object]:
    """An epoch of encoded images, behind the plan."""
    plan = EpochPlan(dataset.num_samples, BATCH, 0)
    steps = range(dataset.num_samples // BATCH)
    source = BatchSource(dataset, plan, VIEWS, 0, 0, 1)
    batches = (source.encoded(source.ids(step)) for step in steps)
    assert dataset.remote
    ahead = dataset.remote.read_ahead(plan, steps, Node.of_rank(0, 1, 1))
    yield from ahead.followed(batches) if ahead else batches


class _Views:
    """The views of one encoded image, as our loaders make them."""

    def __call__(self, encoded: bytes) -> list[torch.Tensor]:
        image = decode(np.frombuffer(encoded, np.uint8))
        sizes = np.array([image.shape[2]]), np.array([image.shape[1]])
        params = [v.sample(0, np.array([0]), np.array([0]), *sizes) for v in VIEWS]
        outputs = empty_views(VIEWS, 1)
        make_views(image, 0, VIEWS, params, outputs)
        return outputs


class _TorchvisionViews:
    """The same augmentation by Pillow and torchvision, as it is done with webdataset."""

    def __init__(self):
        self.make = PillowViews(num_small=0)

    def __call__(self, encoded: bytes) -> list[torch.Tensor]:
        return self.make(Image.open(io.BytesIO(encoded)).convert("RGB"))


def of_webdataset(
    store: Store, tars: Path, transform: Callable[[bytes], object]
) -> Iterator[object]:
    """An epoch of webdataset over URLs, in worker processes."""
    import webdataset

    urls = [f"{store.url}/{BUCKET}/tars/{path.name}" for path in sorted(tars.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000)  # pyright: ignore
    samples = samples.to_tuple("jpg").map_tuple(transform)
    yield from torch.utils.data.DataLoader(
        samples.batched(BATCH, partial=False), None, num_workers=WORKERS
    )


def of_mosaic(local: Path) -> Iterator[object]:
    """An epoch of MosaicML's streaming, in worker processes."""
    import streaming  # pyright: ignore[reportMissingImports]

    make = _Views()

    class Images(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> list[torch.Tensor]:
            return make(super().__getitem__(at)["jpg"])

    images = Images(remote=f"s3://{BUCKET}/mds", local=str(local), shuffle=True, batch_size=BATCH)
    yield from torch.utils.data.DataLoader(images, BATCH, num_workers=WORKERS, drop_last=True)


def write_mds(tars: Path, folder: Path) -> None:
    """The same images in MosaicML's format, in shards of the same size."""
    import streaming  # pyright: ignore[reportMissingImports]

    dataset = TarDataset(tars, "train")
    size = 50 * 110_000
    with streaming.MDSWriter(out=str(folder), columns={"jpg": "bytes"}, size_limit=size) as out:
        for i in range(dataset.num_samples):
            out.write({"jpg": dataset.read(i)})


def say(name: str, rates: Sequence[Rate], disks: Sequence[Rate]) -> float:
    """A row of medians; returns the share of the disk, of the median pair of neighbours."""
    pairs = zip(rates, disks, strict=True)
    share = statistics.median(rate.images_per_s / disk.images_per_s for rate, disk in pairs)
    images_per_s = statistics.median(rate.images_per_s for rate in rates)
    core_ms = statistics.median(rate.core_ms for rate in rates)
    counts = f"{rates[0].num_requests} | {rates[0].num_mb:.0f}"
    print(f"| {name} | {images_per_s:.0f} | {share:.2f} | {core_ms:.1f} | {counts} |", flush=True)
    return share


def run(options: argparse.Namespace, folder: Path) -> None:
    """All conditions, the disk before each of them."""
    tars, url = folder / "tars", f"s3://{BUCKET}/tars"
    num = 256 if options.quick else options.images
    os.sched_setaffinity(0, OURS)  # before the first worker, as the server of workers keeps it
    torch.set_num_threads(1)
    make_tars(tars, num)
    if options.mosaic:
        sys.path.insert(0, options.mosaic)
        write_mds(tars, folder / "mds")
    on_disk = TarDataset(tars, "train")
    list(ours(on_disk, "global"))  # libraries and page cache
    print("| | images/s | of the disk | core ms an image | requests | MB |")
    print("|---|---|---|---|---|---|")
    for latency_ms in options.latencies:
        with Store(folder, latency_ms / 1000) as store:
            for order in options.orders:
                rates: list[tuple[Rate, Rate, Rate]] = []
                for i in range(options.repeats):
                    cache = folder / f"cache-{latency_ms}-{order}-{i}"
                    use_cache(str(cache), 10.0)
                    disk = measure(ours(on_disk, order), num)  # just before: the machine changes
                    dataset = TarDataset(url, "train")
                    cold = measure(ours(dataset, order), num, store)
                    rates.append((disk, cold, measure(ours(dataset, order), num, store)))
                    shutil.rmtree(cache)
                disks, colds, warms = zip(*rates, strict=True)
                say(f"disk, {order}", disks, disks)
                share = say(f"{latency_ms} ms, {order}, cold", colds, disks)
                say(f"{latency_ms} ms, {order}, warm", warms, disks)
                claim(
                    f"images/s, {order} order, cold, {latency_ms} ms, as a share of the disk",
                    share,
                    1.0,
                    higher_is_better=True,
                )
            if latency_ms == 20:
                compare_with_peers(store, folder, num, bool(options.mosaic))


def compare_with_peers(store: Store, folder: Path, num: int, has_mosaic: bool) -> None:
    """Rows of others in these conditions, with our torch loader beside them.

    Where images are decoded it is without the start: our workers import torch, theirs are forked.
    """
    tars, url = folder / "tars", f"s3://{BUCKET}/tars"
    disk = measure(ours(TarDataset(tars, "train"), "global", "torch"), num, start=False)
    say("torch loader, disk", [disk], [disk])
    cases: dict[str, Callable[[], Iterator[object]]] = {
        "torch loader": lambda: ours(TarDataset(url, "train"), "global", "torch"),
        "webdataset": lambda: of_webdataset(store, tars, _Views()),
        "webdataset + torchvision": lambda: of_webdataset(store, tars, _TorchvisionViews()),
    }
    if has_mosaic:
        cases["MosaicML streaming"] = lambda: of_mosaic(folder / "mosaic")
    cases["reading alone"] = lambda: reading(TarDataset(url, "train"))
    cases["webdataset, reading alone"] = lambda: of_webdataset(store, tars, len)
    for name, case in cases.items():
        use_cache(str(folder / f"cache of {name}"), 10.0)
        rate = measure(case(), num, store, start="alone" in name)
        say(f"{name}, cold", [rate], [disk])


class Counted(ReadAhead):
    """Plans as ever, but asks nobody: what it would fetch is there at once."""

    def _run(self) -> None:
        pass

    def _fetch(self, wanted: Range) -> None:
        self.num_requests += 1
        self._cache.states[wanted.sample_ids] = PRESENT
        self._num_waiting -= 1


class Serial:
    """A pool of one thread, the caller's."""

    def __init__(self, *_: object):
        pass

    def submit(self, function: Callable[[Range], None], wanted: Range) -> None:
        function(wanted)


def price_imagenet(folder: Path) -> None:
    """Requests and dollars of the first two epochs of ImageNet-1k on one machine.

    Counted on a fortieth of the images, tars, batch and cache.
    """
    num, mean = IMAGENET[0] // PART, IMAGENET[1]
    sizes = np.random.default_rng(0).gamma(2.0, mean / 2, num).astype(np.int64)
    counts = [len(part) for part in np.array_split(np.arange(num), 640 // PART)]
    rows = np.zeros(num, SIDECAR_DTYPE)
    rows["size"] = sizes
    sidecars = np.split(rows, np.cumsum(counts)[:-1])
    for part in sidecars:
        part["offset"][1:] = np.cumsum(part["size"][:-1] + 2048)
    entries = [
        ShardEntry(name=f"{i}.tar", num_samples=n, bytes=1, sha256="", idx_sha256="", npy_sha256="")
        for i, n in enumerate(counts)
    ]
    index = TarIndex(entries, sidecars)
    read_ahead.ThreadPoolExecutor = Serial  # pyright: ignore[reportAttributeAccessIssue]
    print("| order | cache, GiB | epoch | requests | dollars |\n|---|---|---|---|---|")
    for order in ("global", "block"):
        for cache_gib in (20, 70, 200):
            plan = EpochPlan(num, 4096 // PART, 0, counts if order == "block" else None, 1)
            cache = ShardCache(folder / f"{order}-{cache_gib}", index)
            steps = range(2 * num // (4096 // PART))
            node = Node.of_rank(0, 1, 1)
            ahead = Counted(
                StoreClient("memory://x"), index, cache, cache_gib * GIB // PART, plan, steps, node
            )
            first = 0
            for step in steps:
                first = ahead.num_requests if step <= len(steps) // 2 else first
                ahead._read = step
                while ahead._ahead < steps.stop and ahead._advance():
                    pass
            for epoch, requests in (("first", first), ("second", ahead.num_requests - first)):
                dollars = PART * requests * DOLLARS_A_GET
                name = f"{order} | {cache_gib} | {epoch}"
                print(f"| {name} | {PART * requests:,} | {dollars:.3f} |", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 5, 20, 50])
    parser.add_argument("--orders", nargs="+", default=["global", "block"])
    parser.add_argument("--mosaic", default="", metavar="FOLDER")
    parser.add_argument("--price", action="store_true", help="only count requests of ImageNet-1k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.price:
            price_imagenet(Path(folder))
        else:
            run(options, Path(folder))


if __name__ == "__main__":
    main()
