"""Whatever a store does, nothing is lost, nothing is wrong, and what went wrong is named."""

import pickle
import re
import threading
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
from s3_store import BUCKET, copy_to, proxy_of

from scale_smog.data import EpochPlan, TarDataset, load_manifest
from scale_smog.data.remote import read_ahead
from scale_smog.data.remote import tars as remote_tars
from scale_smog.data.remote.cache import COMING, PRESENT
from scale_smog.data.remote.read_ahead import Node
from scale_smog.data.remote.space import cache_space, use_cache
from scale_smog.errors import UserError
from scale_smog.runtime import stores

URL = f"s3://{BUCKET}/shapes"
ALONE = Node.of_rank(0, 1, 1)


@pytest.fixture
def stored(tars, s3, monkeypatch):
    """The URL of the small dataset; tries follow one another at once, images come one by one."""
    copy_to(tars, URL)
    s3.requests.clear()
    monkeypatch.setattr(stores, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(stores, "LONGEST_DELAY_S", 0.05)
    monkeypatch.setattr(stores, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr(read_ahead, "MERGED_GAP_BYTES", -1)
    return URL


def read_all(dataset):
    return [dataset.read(i) for i in range(dataset.num_samples)]


def read_with_plan(dataset, steps=10):
    """All images, read in the order of a plan, behind the requests that go ahead of it."""
    plan = EpochPlan(dataset.num_samples, 4, seed=1)
    ahead = dataset.remote.read_ahead(plan, range(steps), ALONE)
    found = {}
    for ids in ahead.followed(plan.ids(step) for step in range(steps)):
        found |= {int(i): dataset.read(int(i)) for i in ids}
    return [found[i] for i in range(dataset.num_samples)]


def every(n, kind):
    """A fault at every n-th image, twice: where a connection breaks, aiohttp asks again unsaid."""
    num_tries = Counter()  # of an image

    def fault(handler):
        if not handler.path.endswith(".tar"):
            return None
        place = handler.path, handler.headers["Range"]
        num_tries[place] += 1
        is_one = list(num_tries).index(place) % n == 1
        return kind if is_one and num_tries[place] <= 2 else None

    return fault


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("slow down", "reduce your request rate"),
        ("reset", "trying again after"),
        ("reset half-way", "trying again after"),
        ("truncate", r"sent \d+ bytes of \d+"),
        ("wrong byte", r"came damaged \(crc32\)"),
    ],
)
def test_nothing_is_lost_or_wrong_and_each_fault_is_named(tars, stored, s3, capfd, kind, words):
    s3.fault = every(5, kind)
    assert read_with_plan(TarDataset(stored, "train")) == read_all(TarDataset(tars, "train"))
    assert s3.faults[kind] >= 8
    said = capfd.readouterr().err
    assert re.search(words, said) and f"{URL}/train-00000" in said


def test_a_server_that_is_stopped_is_waited_for(tars, stored, s3, s3_port, monkeypatch, capfd):
    dataset = TarDataset(stored, "train")
    say = stores.Store._say

    def stop(handler):
        if s3.socket.fileno() >= 0 and handler.path.endswith(".tar"):
            s3.shutdown()
            s3.server_close()  # from here on nobody listens
        return "reset"

    lock, started = threading.Lock(), []

    def say_and_start(store, *args):
        say(store, *args)
        with lock:  # many threads read
            if store._num_repeated >= 60 and not started:
                started.append(again.enter_context(proxy_of(s3_port, s3.server_port)))

    monkeypatch.setattr(stores.Store, "_say", say_and_start)
    s3.fault = stop
    with ExitStack() as again:
        assert read_with_plan(dataset) == read_all(TarDataset(tars, "train"))
    said = capfd.readouterr().err
    repeated = [int(x) for x in re.findall(r"(\d+) requests tried again so far", said)]
    assert "Could not connect" in said and max(repeated) >= 60


def test_credentials_that_expire_are_looked_up_again_and_no_message_shows_them(
    tars, stored, s3, tmp_path, monkeypatch, capfd
):
    from s3fs import S3FileSystem

    file = tmp_path / "credentials"

    def write(key):
        text = f"[default]\naws_access_key_id={key}\naws_secret_access_key=SECRET{key}\n"
        file.write_text(text)

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    write("AKIAOLD")
    S3FileSystem.clear_instance_cache()  # with the credentials of before
    monkeypatch.setattr(stores, "LOOK_EVERY_S", 0.2)
    dataset = TarDataset(stored, "train")

    def fault(handler):
        if handler.access_key != "AKIAOLD":
            return None
        if s3.faults["expired"] == 5:
            write("AKIANEW")  # as whoever hands them out does
        return "expired"

    s3.fault = fault
    assert read_with_plan(dataset) == read_all(TarDataset(tars, "train"))
    said = capfd.readouterr().err
    assert "expired" in said and "trying again" in said
    assert not any(secret in said for secret in ("AKIAOLD", "AKIANEW", "SECRET"))


def test_stores_share_a_file_system_until_one_is_refused(stored, s3):
    stores_of_run = [stores.Store(URL) for _ in range(3)]
    names = [set(store.sizes()) for store in stores_of_run]
    assert names[0] and names[1:] == names[:-1]
    first = stores_of_run[0]
    first._opened_at = 0.0  # as if some time had passed
    first._look_again()
    systems = [store._file_system()[0] for store in stores_of_run]
    assert systems[0] is not systems[1] and systems[1] is systems[2]
    assert set(first.sizes()) == names[0]


def test_refused_credentials_end_in_one_line(stored, s3, monkeypatch):
    monkeypatch.setattr(stores, "REFUSAL_PATIENCE_S", 0.1)
    s3.fault = lambda _: "expired"
    with pytest.raises(
        UserError, match=rf"cannot read {URL}/manifest\.json: .*(Forbidden|expired)"
    ):
        TarDataset(stored, "train")


def test_a_cache_disk_that_is_full_is_done_without(tars, stored, s3, small_disk, capfd):
    use_cache(str(small_disk), 1.0)
    dataset = TarDataset(stored, "train")
    with open(small_disk / "filler", "wb") as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(2**16))
            filler.flush()
    assert read_with_plan(dataset) == read_all(TarDataset(tars, "train"))
    assert "the cache takes no more" in capfd.readouterr().err


def test_a_cache_folder_that_cannot_be_made_is_done_without(tars, stored, tmp_path, capfd):
    (tmp_path / "file").write_bytes(b"")
    use_cache(str(tmp_path / "file" / "cache"), 1.0)
    dataset = TarDataset(stored, "train")
    assert read_all(dataset) == read_all(TarDataset(tars, "train"))
    assert "without a cache" in capfd.readouterr().err


def test_what_lies_damaged_in_the_cache_is_fetched_again(tars, stored, s3):
    dataset = TarDataset(stored, "train")
    read_with_plan(dataset)
    for path in cache_space().of_dataset(URL).rglob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert read_all(dataset) == read_all(TarDataset(tars, "train"))


def test_images_that_a_killed_process_was_fetching_are_fetched_by_the_next(
    tars, stored, monkeypatch
):
    monkeypatch.setattr(remote_tars, "GIVE_UP_S", 0.0)  # else it is waited for, not failed
    dataset = TarDataset(stored, "train")
    dataset.remote._cache.states[:] = COMING
    plan = EpochPlan(dataset.num_samples, 4, seed=1)
    ahead = TarDataset(stored, "train").remote.read_ahead(plan, range(10), ALONE)
    ahead._pool.shutdown()
    assert ahead.num_requests == dataset.num_samples
    assert read_all(dataset) == read_all(TarDataset(tars, "train"))
    assert (dataset.remote._cache.states == PRESENT).all()


def test_a_small_cache_stays_small_and_nothing_goes_that_is_read_next(tars, stored, s3):
    size = sum(path.stat().st_size for path in tars.glob("train*.tar"))
    use_cache(cache_space().folder, size / 2 / 2**30)
    dataset, num_steps = TarDataset(stored, "train"), 40
    cache = dataset.remote._cache
    plan = EpochPlan(dataset.num_samples, 4, seed=1)
    ahead = dataset.remote.read_ahead(plan, range(num_steps), ALONE)
    went = []
    remove = cache.remove

    def watched(ids):
        near = plan.ids(ahead._read) if ahead._read < num_steps else []
        went.extend(set(ids.tolist()) & set(np.asarray(near).tolist()))
        remove(ids)

    cache.remove = watched
    for ids in ahead.followed(plan.ids(step) for step in range(num_steps)):
        assert all(dataset.read(int(i)) for i in ids)
        assert cache.extents[cache.states == PRESENT].sum() <= size / 2
        folder = cache_space().of_dataset(URL)
        used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.tar"))
        assert used <= size / 2 + 3 * 2 * 4096 * dataset.num_samples / 3
    assert not went


def test_manifest_and_sidecars_are_read_once_a_machine(stored, s3):
    datasets = [TarDataset(stored, "train") for _ in range(3)]
    gets = {name: n for (method, name), n in s3.requests.items() if method == "GET"}
    assert gets.pop("images") == 1  # the list of the tars
    assert gets == {"manifest.json": 1} | {f"train-00000{i}.npy": 1 for i in range(3)}
    assert len({len(d.labels) for d in datasets}) == 1


def test_a_changed_dataset_is_not_read_from_the_cache_of_the_old(stored, s3):
    read_with_plan(TarDataset(stored, "train"))
    (cache_space().of_dataset(URL) / "manifest.json").unlink()  # older than a start
    store = stores.Store(URL)
    content = store.read("manifest.json")
    seed = load_manifest(stored).split("train").seed
    changed = content.replace(f'"seed": {seed}'.encode(), f'"seed": {seed + 1}'.encode())
    store.write("manifest.json", changed)
    assert not (TarDataset(stored, "train").remote._cache.states == PRESENT).any()
    store.write("manifest.json", content)


def test_a_sidecar_that_comes_damaged_is_read_again(tars, stored, s3):
    s3.fault = lambda x: (
        "wrong byte" if x.path.endswith(".npy") and s3.faults["wrong byte"] < 4 else None
    )
    assert (TarDataset(stored, "train").labels == TarDataset(tars, "train").labels).all()
    assert s3.faults["wrong byte"] == 4


def test_a_missing_tar_is_said_at_the_start(stored):
    store = stores.Store(URL)
    content = store.read("train-000001.tar")
    store.remove("train-000001.tar")
    with pytest.raises(UserError, match=rf"train-000001\.tar is missing from {URL}"):
        TarDataset(stored, "train")
    store.write("train-000001.tar", content)


def test_a_dataset_travels_to_other_processes(tars, stored):
    dataset = pickle.loads(pickle.dumps(TarDataset(stored, "train")))
    assert read_all(dataset) == read_all(TarDataset(tars, "train"))
    assert read_all(dataset.at(tars)) == read_all(dataset)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:word@host/a?X-Amz-Signature=abc", "https://host/a?..."),
        ("cannot get https://host/a?sig=1 now", "cannot get https://host/a?... now"),
    ],
)
def test_urls_are_shown_without_secrets(text, expected):
    assert stores.shown(text) == expected


def test_an_unknown_or_missing_library_is_named():
    with pytest.raises(UserError, match=r"gs://bucket/a needs gcsfs .*pip install gcsfs"):
        stores.Store("gs://bucket/a").read("x")
    with pytest.raises(UserError, match="nonsense://a"):
        stores.Store("nonsense://a").read("x")


def test_no_room_is_made_by_what_is_read_before(stored):
    dataset = TarDataset(stored, "train")
    plan = EpochPlan(dataset.num_samples, 4, seed=1)
    read_with_plan(dataset)
    ahead = dataset.remote.read_ahead(plan, range(10), ALONE)
    ahead.close()
    ahead._limit_bytes = int(dataset.remote._cache.extents.sum())
    assert not ahead._make_room(1, range(10, 20))  # an epoch is ten steps: all is read before
    assert (dataset.remote._cache.states == PRESENT).all()
    assert ahead._make_room(1, range(1, 2))
    assert not (dataset.remote._cache.states == PRESENT).all()
