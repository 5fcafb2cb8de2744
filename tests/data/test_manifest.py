"""Promises of the dataset contract, seen from the reader."""

import errno
import json
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from scale_smog.data import tar_files
from scale_smog.data.images import ImageEntry
from scale_smog.data.manifest import load_manifest, manifest_sha256
from scale_smog.data.prepare.shard import shard_source
from scale_smog.data.prepare.sources import Source
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.errors import UserError
from scale_smog.runtime import retries
from scale_smog.runtime.files import most_open_files, write_atomically

NUM_SAMPLES = 20


def _png(index: int) -> bytes:
    encoded = BytesIO()
    Image.new("RGB", (8 + index, 6), (10 * index, 0, 0)).save(encoded, "PNG")
    return encoded.getvalue()


def _read(name: str) -> bytes:
    return _png(int(name))


@pytest.fixture
def folder(tmp_path):
    images = tuple(ImageEntry(str(i), i % 3, len(_png(i))) for i in range(NUM_SAMPLES))
    source = Source(("a", "b", "c"), images, _read)
    shard_source(source, tmp_path / "data", shard_samples=2, workers=1)
    return tmp_path / "data"


def test_every_sample_is_read_by_its_id(folder):
    dataset = TarDataset(folder, "train")
    assert (dataset.num_samples, dataset.num_classes) == (NUM_SAMPLES, 3)
    assert dataset.classes == ("a", "b", "c")
    assert dataset.labels.dtype == np.int64
    assert dataset.widths.dtype == dataset.heights.dtype == np.int32
    indices = dataset.widths - 8  # the width tells which image it is
    assert sorted(indices) == list(range(NUM_SAMPLES))
    for sample_id, index in enumerate(indices):
        assert dataset.read(sample_id) == _png(index)
        assert dataset.labels[sample_id] == index % 3
        assert dataset.heights[sample_id] == 6


@pytest.mark.parametrize("sample_id", [-1, NUM_SAMPLES])
def test_an_id_out_of_range_is_an_index_error(folder, sample_id):
    with pytest.raises(IndexError, match=str(sample_id)):
        TarDataset(folder, "train").read(sample_id)


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "somewhere").mkdir()
    words = r"no dataset folder .*/nowhere \(did you mean .*/somewhere\?\): data.path=FOLDER names"
    with pytest.raises(UserError, match=words):
        load_manifest(tmp_path / "nowhere")


def test_a_folder_without_manifest_is_unfinished_or_foreign(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"unfinished or foreign; run data_tools/index\.py"):
        TarDataset(folder, "train")


def test_another_format_version_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(UserError, match=r"format_version 2.* reads 1"):
        load_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 1, "classes": 3}'])
def test_a_damaged_manifest_is_one_line(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is (damaged at classes|not a manifest)"):
        load_manifest(folder)


def test_an_unknown_split_lists_those_there_are(folder):
    with pytest.raises(UserError, match=r"'val'.*it has: train"):
        TarDataset(folder, "val")


def test_a_shard_of_another_size_is_named_on_opening(folder):
    with open(folder / "train-000003.tar", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"shard train-000003\.tar .* copy it again"):
        TarDataset(folder, "train")


def test_a_missing_shard_is_named_on_opening(folder):
    (folder / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"shard train-000003\.tar is missing"):
        TarDataset(folder, "train")


def test_a_sidecar_that_changed_is_named_on_opening(folder):
    path = folder / "train-000003.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"train-000003\.npy .* is not the one"):
        TarDataset(folder, "train")


def test_changed_bytes_name_the_shard_and_the_key(folder):
    path = folder / "train-000003.tar"
    content = bytearray(path.read_bytes())
    content[512 + 20] ^= 1  # inside the first image of the shard
    path.write_bytes(content)
    dataset = TarDataset(folder, "train")
    dataset.read(7)
    with pytest.raises(UserError, match=r"train-000003\.tar: sample 000000000006 \(id 6\)"):
        dataset.read(6)


def test_a_shard_cut_while_in_use_is_a_user_error(folder):
    dataset = TarDataset(folder, "train")
    os.truncate(folder / "train-000003.tar", 520)
    with pytest.raises(UserError, match="000000000006"):
        dataset.read(6)


def test_a_shard_that_disappears_while_in_use_is_a_user_error(folder):
    dataset = TarDataset(folder, "train")
    (folder / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read .*train-000003\.tar"):
        dataset.read(6)


@pytest.mark.parametrize("num_failures", [2, 4])
def test_a_file_system_that_fails_over_is_asked_again(folder, monkeypatch, capsys, num_failures):
    monkeypatch.setattr(retries, "RETRY_DELAYS_S", (0, 0, 0))
    dataset = TarDataset(folder, "train")
    expected, real_pread, failures = dataset.read(6), os.pread, iter([1] * num_failures)

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if next(failures, 0):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real_pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    if num_failures == 2:
        assert dataset.read(6) == expected
        assert capsys.readouterr().err.count("Stale file handle; retrying") == 2
    else:
        with pytest.raises(UserError, match=r"cannot read .*Stale file handle"):
            dataset.read(6)


def test_a_pickled_dataset_reads_the_same(folder):
    dataset = TarDataset(folder, "train")
    first = dataset.read(0)  # opens a file, which must not travel
    assert pickle.loads(pickle.dumps(dataset)).read(0) == first


def test_many_threads_share_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(tar_files, "most_open_files", lambda: 2)
    dataset = TarDataset(folder, "train")
    expected = [dataset.read(i) for i in range(NUM_SAMPLES)]
    num_open = len(os.listdir("/proc/self/fd"))
    ids = np.random.default_rng(0).integers(NUM_SAMPLES, size=3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, ids)) == [expected[i] for i in ids]
    assert len(os.listdir("/proc/self/fd")) <= num_open


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(1024, 256), (20, 16), (4000, 1000), (10**9, 2**16), (resource.RLIM_INFINITY, 2**16)],
)
def test_a_reader_keeps_a_quarter_of_the_files_open_that_its_process_may(
    monkeypatch, soft, expected
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert most_open_files() == expected


@pytest.mark.parametrize("travels", [False, True])
def test_a_tar_is_opened_once_where_the_process_may_open_more_files_than_there_are_tars(
    tmp_path, monkeypatch, travels
):
    num_tars = 300  # more than a quarter of the usual 1,024
    images = tuple(ImageEntry(str(i), 0, 100) for i in range(num_tars))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        source = Source(("a",), images, lambda _: _png(0))
        shard_source(source, tmp_path / "data", shard_samples=1, workers=1, full_check=False)
    soft = 4 * num_tars
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    dataset = TarDataset(tmp_path / "data", "train")
    dataset = pickle.loads(pickle.dumps(dataset)) if travels else dataset
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or real(*args))
    for sample_id in 2 * list(range(num_tars)):
        dataset.read(sample_id)
    assert len(opened) == num_tars


def test_the_manifest_hash_names_its_content(folder):
    before = manifest_sha256(folder)
    assert before == manifest_sha256(folder)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    assert manifest_sha256(folder) != before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
