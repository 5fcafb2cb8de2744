"""Tars behind a server: all of them arrive, what breaks is read again, nothing in them runs."""

import functools
import http.server
import pickle
import shlex
import shutil
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import jpeg
from s3_store import BUCKET
from test_bad_input import Canary, write_tar

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, SequentialPlan, TarDataset
from scale_smog.data.augment import CentreView, training_views
from scale_smog.data.loaders import stream as stream_loader
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_training_loader
from scale_smog.data.loaders.stream import StreamLoader, read_tar, shard_urls
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.errors import UserError
from scale_smog.runtime import stores

CPU = torch.device("cpu")
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset fetches with curl")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; breaks the first `breaks` connections half-way, or at byte `cut`."""

    breaks = 0
    cut: int | None = None
    requests: Counter[str]

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        self.requests[self.path] += 1
        content = source.read()
        if self.requests[self.path] <= self.breaks:
            content = content[: self.cut or len(content) // 2]
        outputfile.write(content)


@pytest.fixture
def serve():
    """Starts a real server of a folder: (URL, class of its handlers)."""
    servers = []

    def start(folder: Path, **fields):
        handler = type("Own", (Handler,), {"requests": Counter(), **fields})
        own = functools.partial(handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), own)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def stream(urls, batch, steps, rank=0, world_size=1, threads=2):
    views = training_views(DataConfig(path="", large_px=16), AugmentConfig())
    plan = EpochPlan(batch * world_size, batch * world_size)  # only the size of a batch counts
    source = BatchSource(None, plan, views, 3, rank, world_size)
    return StreamLoader(urls, source, steps, threads, CPU)


@needs_curl
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_arrives_once_a_pass_over_all_ranks(tars, serve, world_size):
    url, _ = serve(tars)
    urls = shard_urls(f"{url}/train-{{000000..000002}}.tar", allow_pipe=False)
    dataset = TarDataset(tars, "train")  # 16, 16 and 8 samples
    seen = Counter()
    for rank in range(world_size):
        loader = stream(urls, 8, range(1), rank, world_size)
        samples = loader._passes()
        own = list(islice(samples, sum(dataset.shard_sizes)))
        seen.update(s.encoded for s in own if s.epoch == 0)
        assert all(sample.label in range(4) for sample in own)
    assert seen == Counter(dataset.read(i) for i in range(dataset.num_samples))


@needs_curl
def test_the_recipe_names_a_stream_and_gets_the_same_kind_of_batch(tars, serve):
    url, _ = serve(tars)
    keys = {"global_batch": 8, "large_px": 48, "num_small_crops": 1, "small_px": 24, "workers": 2}
    pattern = f"{url}/train-{{000000..000002}}.tar"
    data = DataConfig(path=str(tars), loader="stream", stream=pattern, **keys)
    dataset, views = TarDataset(tars, "train"), training_views(data, AugmentConfig())
    plan = EpochPlan(dataset.num_samples, 8, seed=3)

    def load():
        return list(build_training_loader(data, views, dataset, plan, range(6), CPU))

    batches, again = load(), load()
    assert len(batches) == 6
    for a, b in zip(batches, again, strict=True):
        assert [tuple(v.shape) for v in a.large] == [(8, 3, 48, 48)] * 2
        assert all(v.is_contiguous(memory_format=torch.channels_last) for v in a.large)
        assert a.label.dtype == a.sample_id.dtype == torch.int64
        assert all(torch.equal(x, y) for x, y in zip(a.large, b.large, strict=True))
        assert torch.equal(a.sample_id, b.sample_id)
    first = torch.cat([batch.sample_id for batch in batches[:5]])
    assert len(set(first.tolist())) > 20  # of 40: a buffer, not a plan
    assert not torch.equal(batches[0].large[0], batches[0].large[1])


@needs_curl
def test_views_are_the_torch_loaders(tars, serve):
    url, _ = serve(tars)
    url += "/train-000000.tar"
    view, dataset = CentreView(24, 0.875), TarDataset(tars, "train")
    source = BatchSource(dataset, SequentialPlan(np.arange(16), 16), [view], 0, 0, 1)
    (expected,) = TorchLoader(source, range(1), 0, CPU)
    loader = StreamLoader([url], source, range(1), 2, CPU)
    with ThreadPoolExecutor(2) as threads:
        batch = loader._make(read_tar(url), threads)
    assert torch.equal(batch.large[0], expected.large[0])
    assert torch.equal(batch.label, expected.label)


@needs_curl
@pytest.mark.parametrize("cut", [None, "at a member's end"])
def test_a_broken_connection_is_tried_again_and_loses_nothing(tars, serve, capsys, cut):
    whole = [TarDataset(tars, "train").read(i) for i in range(16)]
    third_sample = int((tars / "train-000000.idx").read_text().split()[19]) - tarfile.BLOCKSIZE
    url, handler = serve(tars, breaks=2, cut=third_sample if cut else None)
    samples = list(read_tar(f"{url}/train-000000.tar"))
    assert [sample.encoded for sample in samples] == whole
    assert handler.requests["/train-000000.tar"] == 3
    assert "trying again" in capsys.readouterr().err


@needs_curl
def test_a_tar_that_stays_broken_is_named(tars, serve):
    url, _ = serve(tars, breaks=100)
    with pytest.raises(UserError, match=r"data\.stream: cannot read .*/train-000000\.tar"):
        list(stream([f"{url}/train-000000.tar"], 8, range(9)))


def test_a_pipe_runs_only_when_allowed(tars, tmp_path):
    canary = tmp_path / "canary"
    command = f"touch {shlex.quote(str(canary))}; cat {shlex.quote(str(tars))}/train-000000.tar"
    with pytest.raises(UserError, match=r"set data\.allow_pipe=true"):
        shard_urls(f"pipe:{command}", allow_pipe=False)
    with pytest.raises(UserError, match=r"set data\.allow_pipe=true"):
        shard_urls(f"{{https://host/a.tar,pipe:{command}}}", allow_pipe=False)
    assert not canary.exists()
    (url,) = shard_urls(f"pipe:{command}", allow_pipe=True)
    assert len(list(read_tar(url))) == 16 and canary.exists()


def test_a_program_may_write_more_than_the_tar(tars):
    more = "head -c 2000000 /dev/zero || exit 7"  # fails if nobody reads it
    samples = list(read_tar(f"pipe:cat {shlex.quote(str(tars))}/train-000000.tar; {more}"))
    assert len(samples) == 16


def test_a_stored_tar_that_breaks_goes_on_at_the_byte_it_had_reached(tars, s3, monkeypatch, capfd):
    path = tars / "train-000000.tar"
    monkeypatch.setattr(stream_loader, "RANGE_BYTES", 2**13)
    stores.Store(f"s3://{BUCKET}/stream").upload(path, path.name)
    s3.num_bytes = 0
    s3.fault = lambda x: (
        "reset half-way" if x.command == "GET" and s3.requests.total() % 3 == 0 else None
    )
    (url,) = shard_urls(f"s3://{BUCKET}/stream/train-000000.tar", allow_pipe=False)
    whole = [TarDataset(tars, "train").read(i) for i in range(16)]
    assert [sample.encoded for sample in read_tar(url)] == whole
    assert s3.faults["reset half-way"] > 1 and s3.num_bytes == path.stat().st_size
    assert "trying again" in capfd.readouterr().err


def test_a_stored_tar_that_is_not_there_is_named(s3):
    with pytest.raises(UserError, match=r"cannot read s3://images/none\.tar: .*has no none\.tar"):
        list(read_tar(f"s3://{BUCKET}/none.tar"))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/data/a.tar", "ftp://host/a.tar"])
def test_other_schemes_are_refused_by_name(url):
    with pytest.raises(UserError, match="is none of http, https, s3, gs, az, hf, pipe"):
        shard_urls(url, allow_pipe=True)


def test_links_in_a_stream_are_refused_by_name(tmp_path, capsys):
    tar = tmp_path / "a.tar"
    write_tar(tar, [("000009.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})])
    samples = list(read_tar(f"pipe:cat {shlex.quote(str(tar))}"))
    assert len(samples) == 6
    assert "000009.jpg: not a plain file" in capsys.readouterr().err


@needs_curl
def test_a_pickle_in_a_stream_never_runs_and_bad_images_cost_no_other(tmp_path, serve, capsys):
    canary = tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    extra = [("000009.pickle", content, {}), ("000009.pyd", content, {})]
    extra += [("../000008.jpg", jpeg(9, 9, 8), {}), ("000007.jpg", b"garbage", {})]
    write_tar(tmp_path / "tars" / "a.tar", extra)
    url, _ = serve(tmp_path / "tars")
    batches = list(stream([f"{url}/a.tar"], 6, range(2)))
    named = capsys.readouterr().err
    assert all(name in named for name in ("000009.pickle", "000009.pyd", "../000008.jpg"))
    assert "left out" in named and "#000007" in named
    assert len({i for batch in batches for i in batch.sample_id.tolist()}) == 6
    assert not canary.exists()


def test_fewer_tars_than_ranks_is_one_line():
    with pytest.raises(UserError, match="names 1 tars, fewer than 2 ranks"):
        stream(["https://host/a.tar"], 8, range(1), 0, 2)


def test_a_stream_and_its_loader_go_together():
    with pytest.raises(ValueError, match=r"data\.loader=stream and data\.stream go together"):
        DataConfig(path="", stream="https://host/a.tar")
