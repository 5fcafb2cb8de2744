"""A dataset in a store is the dataset on the disk, whatever the store does."""

import gc
import time

import numpy as np
import pytest
import torch
from s3_store import BUCKET, copy_to

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders import build
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_plan
from scale_smog.data.plan import SequentialPlan
from scale_smog.data.remote import cache, read_ahead
from scale_smog.data.remote.cache import ABSENT, COMING
from scale_smog.data.remote.read_ahead import Node
from scale_smog.data.remote.space import cache_space, use_cache

CPU = torch.device("cpu")
URL = f"s3://{BUCKET}/shapes"


@pytest.fixture
def stored(tars, s3):
    """The URL of the small dataset in a store."""
    copy_to(tars, URL)
    s3.requests.clear()
    return URL


def read_all(dataset):
    return [dataset.read(i) for i in range(dataset.num_samples)]


def test_every_image_is_the_same_from_the_store(tars, stored, s3):
    local, remote = TarDataset(tars, "train"), TarDataset(stored, "train")
    assert read_all(remote) == read_all(local)
    assert remote.classes == local.classes and (remote.labels == local.labels).all()


def test_images_are_there_before_they_are_read_and_neighbours_come_together(tars, stored, s3):
    remote = TarDataset(stored, "train")
    plan = EpochPlan(remote.num_samples, 8, seed=1)
    s3.requests.clear()
    ahead = remote.remote.read_ahead(plan, range(10), Node.of_rank(0, 1, 1))
    assert read_all(remote) == read_all(TarDataset(tars, "train"))
    ahead.close()
    assert sum(s3.requests.values()) == ahead.num_requests == 3  # a tar each
    assert read_all(remote) and sum(s3.requests.values()) == 3


def test_wider_gaps_are_read_where_the_cache_keeps_what_lies_between(tars, stored, monkeypatch):
    remote = TarDataset(stored, "train")
    cache, plan = remote.remote._cache, EpochPlan(remote.num_samples, 8, seed=1)
    wanted = np.arange(0, remote.num_samples, 3)
    monkeypatch.setattr(read_ahead, "MERGED_GAP_BYTES", int(2 * cache.extents.max()) // 3)
    all_bytes = int(cache.extents.sum())

    def num_requests(limit_bytes):
        remote.remote._limit_bytes = limit_bytes
        ahead = remote.remote.read_ahead(plan, range(0), Node.of_rank(0, 1, 1))
        ahead.close()
        return len(ahead._ranges(wanted, ahead._gap_bytes))

    assert num_requests(all_bytes) == 3  # a tar each
    assert num_requests(all_bytes - 1) == len(wanted)


def test_images_come_ahead_though_what_lies_between_them_does_not_fit(tars, stored):
    remote = TarDataset(stored, "train")
    cache, plan = remote.remote._cache, EpochPlan(remote.num_samples, 4, seed=3)
    remote.remote._limit_bytes = int(cache.extents.sum() * 0.25)
    ahead = remote.remote.read_ahead(plan, range(10), Node.of_rank(0, 1, 1))
    first = np.concatenate([plan.ids(step) for step in range(ahead._ahead)])
    while (cache.states == COMING).any():
        time.sleep(0.01)
    ahead.close()
    assert ahead._ahead and (cache.states[first] != ABSENT).all()
    assert (cache.states != ABSENT).sum() == len(first)  # and nothing else


def test_a_cache_keeps_as_many_files_open_as_the_process_may(stored, monkeypatch):
    monkeypatch.setattr(cache, "most_open_files", lambda: 777)
    opened = TarDataset(stored, "train").remote._cache._open
    assert opened.cache_parameters()["maxsize"] == 777


def is_true_soon(condition, patience_s=60.0):
    """Whether it becomes true within the time that a thread may need on a busy machine."""
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("steps_left", [60, 6], ids=["midway", "near the end"])
def test_images_come_ahead_again_after_an_evaluation_has_used_the_cache(
    tars, stored, monkeypatch, steps_left
):
    monkeypatch.setattr(read_ahead, "MERGED_GAP_BYTES", 0)  # an image a request
    size = sum(path.stat().st_size for path in tars.glob("train*.tar"))
    use_cache(cache_space().folder, size / 2 / 2**30)
    dataset, evaluated_at = TarDataset(stored, "train"), 90
    states, num_steps = dataset.remote._cache.states, evaluated_at + steps_left
    plan, alone = EpochPlan(dataset.num_samples, 1, seed=1), Node.of_rank(0, 1, 1)
    ahead, missed = dataset.remote.read_ahead(plan, range(num_steps), alone), []

    def load():
        for step in range(num_steps):
            ids = plan.ids(step)
            if not missed and not is_true_soon(lambda ids=ids: (states[ids] != ABSENT).all()):
                missed.append(step)
            yield [dataset.read(int(i)) for i in ids]

    for step, contents in enumerate(ahead.followed(load())):
        assert all(contents)
        if step == evaluated_at:
            # As far ahead as it goes, so that no window to come is one of the images near it.
            assert is_true_soon(lambda: ahead._ahead >= min(num_steps, evaluated_at + 6))
            in_order = SequentialPlan(np.arange(dataset.num_samples), 1)
            other = dataset.remote.read_ahead(in_order, range(in_order.num_steps()), alone)
            every_id = range(dataset.num_samples)
            assert len(list(other.followed(dataset.read(i) for i in every_id))) == len(every_id)
            next_ids = np.concatenate([plan.ids(s) for s in range(step + 1, ahead._ahead)])
            assert (states[next_ids] == ABSENT).any()
    assert not missed
    assert is_true_soon(lambda: not ahead._thread.is_alive())


VIEWS = training_views(
    DataConfig(path="", num_small_crops=1, large_px=24, small_px=16), AugmentConfig()
)


def load(path, steps, loader, rank=0, world_size=1, order="global", workers=0):
    """Batches of one of several ranks of one machine, in its own process's place."""
    dataset = TarDataset(path, "train")
    data = DataConfig(
        path=str(path), global_batch=12, loader=loader, order=order, block_shards=2, workers=workers
    )
    plan = build_plan(data, dataset, seed=3)
    source = BatchSource(dataset, plan, VIEWS, 3, rank, world_size)
    return build._build(data, source, steps, CPU)


def assert_equal_batches(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.sample_id, other.sample_id)
        assert torch.equal(batch.label, other.label)
        for a, b in zip(batch.large + batch.small, other.large + other.small, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("loader", "order", "workers"),
    [("torch", "global", 0), ("torch", "block", 2), ("dali", "block", 2), ("memory", "global", 0)],
)
def test_an_epoch_from_the_store_has_the_samples_and_pixels_of_the_disk(
    tars, stored, loader, order, workers
):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    expected = load(tars, range(5), loader, order=order, workers=workers)
    assert_equal_batches(load(stored, range(5), loader, order=order, workers=workers), expected)


def test_fifty_batches_after_a_stop_are_the_same_on_other_ranks(tars, stored, monkeypatch):
    world_size = 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))
    use_cache(cache_space().folder, 100_000 / 2**30)  # a third of the set
    stopped = iter(load(stored, range(50), "torch"))
    for _ in range(7):
        next(stopped)
    del stopped
    gc.collect()
    whole = list(load(tars, range(7, 57), "torch"))
    ranks = [load(stored, range(7, 57), "torch", r, world_size) for r in range(world_size)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([p.sample_id for p in parts]), expected.sample_id)
        for i in range(2):
            assert torch.equal(torch.cat([p.large[i] for p in parts]), expected.large[i])
