"""A run goes on with the same samples and the same pixels on another number of ranks."""

import gc
import os
import resource
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from images import jpeg

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset, tar_files
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.images import ImageEntry
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_plan
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.data.prepare.shard import shard_source
from scale_smog.data.prepare.sources import Source

MAX_OPEN_FILES = 64
CPU = torch.device("cpu")
STOP, NUM_STEPS = 7, 20
GLOBAL_BATCH = 12


def load(tars, steps, loader, rank=0, world_size=1, workers=0):
    if loader == "dali":
        make = pytest.importorskip("scale_smog.data.loaders.dali").DaliCpuLoader
    else:
        make = TorchLoader
    data = DataConfig(path="", num_small_crops=1, large_px=24, small_px=16)
    views = training_views(data, AugmentConfig())
    dataset = TarDataset(tars, "train")
    plan = EpochPlan(dataset.num_samples, GLOBAL_BATCH, seed=3)
    return make(BatchSource(dataset, plan, views, 3, rank, world_size), steps, workers, CPU)


class Whole(dict[str, list[Batch]]):
    """The batches of one rank that is never stopped, by loader."""

    def __init__(self, tars: Path) -> None:
        self._tars = tars

    def __missing__(self, loader: str) -> list[Batch]:
        self[loader] = list(load(self._tars, range(STOP + NUM_STEPS), loader))
        return self[loader]


@pytest.fixture(scope="module")
def whole(tars: Path) -> Whole:
    return Whole(tars)


@pytest.mark.parametrize(
    ("loader", "world_size", "workers"),
    [("torch", 3, 0), ("torch", 1, 2), ("dali", 2, 1), ("dali", 4, 2)],
)
def test_twenty_batches_after_a_stop_are_the_same_bits_on_other_ranks(
    tars, whole, loader, world_size, workers
):
    steps = range(STOP, STOP + NUM_STEPS)  # 40 samples: past six epochs
    parts = [load(tars, steps, loader, r, world_size, workers) for r in range(world_size)]
    for expected, *of_ranks in zip(whole[loader][STOP:], *parts, strict=True):
        ids = torch.cat([batch.sample_id for batch in of_ranks])
        assert torch.equal(ids, expected.sample_id)
        for i in range(2):
            assert torch.equal(torch.cat([b.large[i] for b in of_ranks]), expected.large[i])
        assert torch.equal(torch.cat([b.small[0] for b in of_ranks]), expected.small[0])


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """200 shards of four small images."""
    folder = tmp_path_factory.mktemp("many")
    images = tuple(ImageEntry(str(i), 0, 1000) for i in range(800))
    source = Source(("a",), images, _read_small)
    with mock.patch("os.fsync"):  # 1,600 times
        shard_source(source, folder, shard_samples=4, workers=1, full_check=False)
    return folder


def _read_small(name: str) -> bytes:
    return jpeg(12, 10, int(name) % 7)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_memory_is_flat_and_files_are_few_over_500_batches_of_200_shards(
    many_shards, loader, monkeypatch
):
    monkeypatch.setattr(tar_files, "most_open_files", lambda: MAX_OPEN_FILES)
    if loader == "dali":
        make = pytest.importorskip("scale_smog.data.loaders.dali").DaliCpuLoader
    else:
        make = TorchLoader
    data = DataConfig(path="", large_px=8)
    dataset = TarDataset(many_shards, "train")
    assert len(dataset.shard_sizes) == 200
    plan = EpochPlan(dataset.num_samples, 1, seed=0)
    source = BatchSource(dataset, plan, training_views(data, AugmentConfig())[:1], 0, 0, 1)
    files_before, most_files, resident_mib = len(os.listdir("/proc/self/fd")), 0, []
    for step, _ in enumerate(make(source, range(500), 0, CPU)):
        if step % 50 == 49:
            most_files = max(most_files, len(os.listdir("/proc/self/fd")))
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident_mib.append(pages * resource.getpagesize() / 2**20)
    assert (
        most_files - files_before < MAX_OPEN_FILES + 40
    )  # the reader's cache, and what DALI opens
    assert resident_mib[-1] - resident_mib[3] < 4, resident_mib  # 13 KiB a batch


def test_the_order_is_taken_from_the_recipe(tars):
    dataset = TarDataset(tars, "train")
    data = DataConfig(path="", global_batch=dataset.num_samples, order="block", block_shards=1)
    shard_of = np.repeat(np.arange(len(dataset.shard_sizes)), dataset.shard_sizes)
    seen = shard_of[build_plan(data, dataset, seed=0).ids(0)]
    assert np.count_nonzero(np.diff(seen)) == len(dataset.shard_sizes) - 1
