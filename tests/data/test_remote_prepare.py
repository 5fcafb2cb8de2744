"""Datasets are made, checked and described in a store as in a folder."""

import pytest
from images import jpeg
from s3_store import BUCKET

from scale_smog.data import TarDataset, load_manifest
from scale_smog.data.prepare import index, verify, work_folder
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.stats import describe, draw_samples
from scale_smog.data.prepare.verify import verify_folder
from scale_smog.errors import UserError
from scale_smog.runtime import stores
from scale_smog.runtime.stores import Store


@pytest.fixture
def url(s3, tmp_path, monkeypatch):
    """A place of its own in the store; no worker processes, whose environment is an older one."""
    for module in (index, verify):
        monkeypatch.setattr(module, "num_usable_cores", lambda: 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(work_folder.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def pictures(tmp_path):
    for i in range(12):
        folder = tmp_path / "pictures" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(40 + i % 7, 40 + i % 5, i))
    return tmp_path / "pictures"


def shard(source, out):
    return shard_folder(source, out, shard_samples=4, workers=1)


def test_a_store_gets_the_files_that_a_folder_gets(pictures, tmp_path, url):
    shard(pictures, tmp_path / "local")
    shard(pictures, url)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    store = Store(url)
    assert {name: store.read(name) for name in store.sizes()} == local
    assert not list((tmp_path / "temporary").rglob("*.tar"))
    assert load_manifest(url) == load_manifest(tmp_path / "local")
    assert verify_folder(url) == []
    assert describe(url) == describe(tmp_path / "local")
    draw_samples(url, tmp_path / "grid.png", num_images=2)
    assert (tmp_path / "grid.png").stat().st_size


def test_a_folder_named_by_a_url_is_made_and_gets_the_same_files(pictures, tmp_path):
    shard(pictures, tmp_path / "local")
    shard(pictures, f"file://{tmp_path}/new/tars")
    local, named = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "local", tmp_path / "new" / "tars")
    )
    assert named == local


def test_an_interrupted_run_goes_on_and_the_manifest_comes_last(pictures, url, s3, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE_S", 0.0)
    uploads = []

    def fault(handler):
        if handler.command == "PUT":
            uploads.append(handler.path.rpartition("/")[2])
        return "reset" if len(uploads) > 4 else None  # in the second shard

    s3.fault = fault
    with pytest.raises(UserError, match=rf"cannot write {url}/train-000001\.\*: .*same command"):
        shard(pictures, url)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        s3.fault = lambda _: None
        TarDataset(url, "train")
    before = set(uploads[:3])
    uploads.clear()
    s3.fault = lambda x: uploads.append(x.path.rpartition("/")[2]) if x.command == "PUT" else None
    shard(pictures, url)
    assert not before & set(uploads) and uploads[-1] == "manifest.json"
    assert verify_folder(url) == []


def test_what_is_wrong_in_a_store_is_named(pictures, url):
    shard(pictures, url)
    store = Store(url)
    content = bytearray(store.read("train-000001.tar"))
    content[2000] ^= 1
    store.write("train-000001.tar", bytes(content))
    store.remove("train-000002.idx")
    store.write("train-000009.npy", b"other")
    problems = "\n".join(verify_folder(url))
    assert "train-000001.tar: not the file the manifest describes" in problems
    assert "train-000002.idx: missing" in problems
    assert "train-000009.npy: not in the manifest" in problems


def test_tars_of_others_in_a_store_are_kept_apart_and_can_be_indexed(pictures, tmp_path, url):
    shard(pictures, tmp_path / "local")
    for path in (tmp_path / "local").glob("*.tar"):
        Store(url).upload(path, path.name)
    with pytest.raises(UserError, match=r"has train-000000\.tar"):
        shard(pictures, url)
    split = index_folder(url)
    assert split.num_samples == 12 and verify_folder(url) == []
    local, remote = TarDataset(tmp_path / "local", "train"), TarDataset(url, "train")
    assert [remote.read(i) for i in range(12)] == [local.read(i) for i in range(12)]
