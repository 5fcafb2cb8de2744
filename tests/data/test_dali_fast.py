"""DALI's own reader: every sample once a pass, the same views as the other loaders' kind."""

import tarfile
from collections import Counter
from io import BytesIO
from itertools import combinations

import pytest
import torch
from images import jpeg

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.shard import shard_folder

CPU = torch.device("cpu")
NUM_IMAGES, NUM_CLASSES = 48, 12


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Four shards of twelve images, labelled 0 to 11."""
    folder = tmp_path_factory.mktemp("fast")
    for i in range(NUM_IMAGES):
        path = folder / "images" / f"{i % NUM_CLASSES:02d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(40 + i, 30, seed=i))
    shard_folder(folder / "images", folder / "tars", workers=1, shard_samples=12)
    return TarDataset(folder / "tars", "train")


def load(dataset, steps, batch, rank=0, world_size=1, augment=None):
    fast = pytest.importorskip("scale_smog.data.loaders.dali_fast")
    data = DataConfig(path="", num_small_crops=1, large_px=24, small_px=16)
    views = training_views(data, augment or AugmentConfig())
    plan = EpochPlan(dataset.num_samples, batch * world_size)
    source = BatchSource(dataset, plan, views, 3, rank, world_size)
    return list(fast.FastDaliLoader(source, steps, 1, CPU, on_gpu=False))


def test_ranks_together_see_every_label_as_often_as_it_is_there(many):
    parts = [load(many, range(3), 8, rank, 2) for rank in range(2)]
    labels = Counter(int(y) for part in parts for batch in part for y in batch.label)
    assert labels == Counter(dict.fromkeys(range(NUM_CLASSES), NUM_IMAGES // NUM_CLASSES))


def test_a_run_repeats_to_the_bit_and_another_start_does_not(many):
    one, again, later = load(many, range(4), 8), load(many, range(4), 8), load(many, range(1, 5), 8)
    assert all(torch.equal(a.large[1], b.large[1]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[1].large[1], later[0].large[1])


def test_batches_have_the_form_of_the_other_loaders(many):
    batch = load(many, range(1), 8)[0]
    assert [tuple(view.shape) for view in batch.large] == [(8, 3, 24, 24)] * 2
    assert tuple(batch.small[0].shape) == (8, 3, 16, 16)
    assert batch.large[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(batch.large[0], batch.large[1])
    assert batch.label.dtype == torch.int64


def test_no_rank_and_no_view_draws_the_crops_of_another(tmp_path):
    for i in range(16):  # the same image everywhere: views of one crop would be alike
        path = tmp_path / "images" / "0" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(40, 30, seed=0))
    shard_folder(tmp_path / "images", tmp_path / "tars", workers=1, shard_samples=4)
    plain = AugmentConfig(flip=0, jitter=0, grey=0, blur=(0, 0), solarize=(0, 0))
    dataset = TarDataset(tmp_path / "tars", "train")
    parts = [load(dataset, range(1), 8, rank, 2, plain)[0] for rank in range(2)]
    views = [view for batch in parts for view in batch.large]
    for a, b in combinations(views, 2):
        assert not (a == b).flatten(1).all(dim=1).any()


def test_tars_of_others_with_other_names_and_no_labels_are_read(tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for i, name in enumerate(("a.JPEG", "b.jpeg", "c.Jpg", "d.jpg")):
            member = tarfile.TarInfo(name)
            content = jpeg(40, 30, seed=i)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    index_folder(tmp_path)
    (batch,) = load(TarDataset(tmp_path, "train"), range(1), 4)
    assert batch.label.tolist() == [-1] * 4
    assert len({view.sum().item() for view in batch.large[0]}) == 4
