"""A folder of images trains like tars: the same images, order, resume and loaders."""

import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from images import jpeg, make_dataset, photo
from PIL import Image
from small_recipe import small_recipe

from scale_smog import checkpoint
from scale_smog.config import AugmentConfig, DataConfig, EvaluationConfig
from scale_smog.data import EpochPlan, TarDataset, images
from scale_smog.data.augment import training_views
from scale_smog.data.datasets import Images, has_split, list_splits, open_split
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.data.loaders.build import (
    build_evaluation_loader,
    build_training_loader,
    require_loader,
)
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.stats import describe
from scale_smog.errors import UserError
from scale_smog.pretrain import pretrain

CPU = torch.device("cpu")
has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not has_dali, reason="nvidia-dali is not installed")
LOADERS = ["torch", pytest.param("dali", marks=needs_dali), "memory"]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two classes of thirty images, among them kinds that readers disagree about."""
    for i in range(60):
        path = tmp_path / "pictures" / "cd"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(40 + i % 7, 30 + i % 5, i))
    turned = Image.Exif()
    turned[0x112] = 6
    folder = tmp_path / "pictures" / "c"
    (folder / "turned.jpg").write_bytes(encoded(photo(40, 30, 1), "JPEG", exif=turned))
    (folder / "cmyk.jpg").write_bytes(encoded(photo(40, 30, 2).convert("CMYK"), "JPEG"))
    (folder / "palette.png").write_bytes(encoded(photo(40, 30, 3).convert("P"), "PNG"))
    return tmp_path / "pictures"


def contents(dataset: Images) -> dict[bytes, tuple[int, int, int]]:
    """Label and size of each image."""
    numbers = zip(dataset.labels, dataset.widths, dataset.heights, strict=True)
    return {dataset.read(i): tuple(map(int, row)) for i, row in enumerate(numbers)}


def test_a_folder_gives_the_bytes_labels_and_sizes_that_tars_of_it_give(pictures, tmp_path):
    shard_folder(pictures, tmp_path / "tars", workers=1)
    folder, tars = open_split(pictures, "train"), open_split(tmp_path / "tars", "train")
    assert isinstance(folder, FolderDataset) and isinstance(tars, TarDataset)
    assert contents(folder) == contents(tars) and folder.num_samples == 63
    assert (folder.classes, folder.num_classes) == (tars.classes, 2)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_makes_of_a_folder_what_it_makes_of_tars(pictures, tmp_path, loader):
    shard_folder(pictures, tmp_path / "tars", workers=1)
    data = DataConfig(path="", loader=loader, workers=0, global_batch=8, large_px=24, small_px=16)
    views = training_views(data, AugmentConfig())
    crops = {}
    for path in (pictures, tmp_path / "tars"):
        dataset = open_split(path, "train")
        ids = np.arange(dataset.num_samples)
        config = EvaluationConfig(image_px=24, batch=16)
        batches = build_evaluation_loader(data, config, dataset, ids, CPU)
        rows = torch.cat([batch.large[0] for batch in batches])
        crops[path] = {dataset.read(i): rows[i] for i in ids}
    folder, tars = crops.values()
    assert all(torch.equal(folder[content], tars[content]) for content in tars)

    dataset = open_split(pictures, "train")
    plan = EpochPlan(dataset.num_samples, 8, seed=3)
    for batch in build_training_loader(data, views, dataset, plan, range(2), CPU):
        assert torch.equal(batch.label, torch.from_numpy(dataset.labels[batch.sample_id]))


def test_dalis_own_reader_says_that_it_takes_tars_only(pictures):
    data = DataConfig(path=str(pictures), loader="fast")
    with pytest.raises(UserError, match=r"fast reads tars.*folder of images: take data\.loader="):
        require_loader(data, CPU)


LAYOUTS = {  # images: the splits that are found
    ("1.jpg", "2.jpg"): {"train": (2, ())},
    ("cat/1.jpg", "dog/2.jpg"): {"train": (2, ("cat", "dog"))},
    ("train/1.jpg", "val/2.jpg"): {"train": (1, ()), "val": (1, ())},
    ("Training/cat/1.jpg", "test_set/cat/2.jpg"): {"train": (1, ("cat",)), "test": (1, ("cat",))},
    ("train/cat/1.jpg", "devkit/data.mat"): {"train": (1, ("cat",))},
    ("train/1.jpg", "car/2.jpg"): {"train": (2, ("car", "train"))},  # a class of vehicles
    ("val/1.jpg", "val2/1.jpg", "train/2.jpg"): {"train": (1, ()), "val": (1, ())},
}


@pytest.mark.parametrize("names", LAYOUTS, ids=" ".join)
def test_folders_of_all_layouts_train_as_they_are(tmp_path, names):
    for seed, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20, 16, seed))
    found = {
        split: (dataset.num_samples, dataset.classes)
        for split in ("train", "val", "test")
        if has_split(tmp_path, split)
        for dataset in [open_split(tmp_path, split)]
    }
    assert found == LAYOUTS[names]
    assert set(list_splits(tmp_path)) <= set(found)
    with pytest.raises(UserError, match="no split 'other'"):
        open_split(tmp_path, "other")


def test_two_folders_that_may_be_one_split_are_named(tmp_path):
    for name in ("val2014/1.jpg", "val2017/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg(20, 16, 1))
    with pytest.raises(UserError, match=r"val2014 and .*val2017 may both be the split val"):
        open_split(tmp_path, "val")


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """Images that are looked at from here on."""
    seen = []
    real = images.decode

    def decode(content, pixels=True):
        seen.append(content)
        return real(content, pixels)

    monkeypatch.setattr(images, "decode", decode)
    return seen


def test_only_new_and_changed_images_are_looked_at_again(pictures, decoded):
    first = open_split(pictures, "train").sha256
    assert len(decoded) == 63
    assert open_split(pictures, "train").sha256 == first and len(decoded) == 63
    (pictures / "c" / "new.jpg").write_bytes(jpeg(20, 20, 100))
    shutil.copy(pictures / "c" / "00.jpg", pictures / "d" / "01.jpg")
    changed = open_split(pictures, "train")
    assert len(decoded) == 65 and changed.num_samples == 64 and changed.sha256 != first
    (pictures / "c" / "new.jpg").unlink()
    (pictures / "d" / "01.jpg").write_bytes(jpeg(41, 31, 1))
    assert open_split(pictures, "train").sha256 == first  # of names and contents, not of times
    assert len(decoded) == 66
    path = pictures / "d" / "03.jpg"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)  # as long as before
    assert open_split(pictures, "train").sha256 != first and len(decoded) == 67


def test_a_start_that_was_killed_goes_on_with_the_images_it_had_not_seen(
    pictures, decoded, monkeypatch
):
    monkeypatch.setattr("scale_smog.data.folder_dataset.IMAGES_AT_ONCE", 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        keep = "scale_smog.data.folder_dataset._Index._keep"
        real = FolderDataset.__init__.__globals__["_Index"]._keep

        def keep_once(self, rows):
            real(self, rows)
            raise KeyboardInterrupt

        patch.setattr(keep, keep_once)
        open_split(pictures, "train")
    assert len(decoded) == 20
    assert open_split(pictures, "train").num_samples == 63 and len(decoded) == 63


@pytest.fixture
def keeps(monkeypatch) -> list[int]:
    """Images that were known at each writing of the index; each seems to take an hour."""
    known, clock = [], [1.0]
    index = FolderDataset.__init__.__globals__["_Index"]
    real = index._keep

    def keep(self, rows):
        real(self, rows)
        known.append(int((rows["width"] != 0).sum()))
        clock[0] += 3600

    monkeypatch.setattr(index, "_keep", keep)
    monkeypatch.setattr("scale_smog.data.folder_dataset.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("scale_smog.data.folder_dataset.IMAGES_AT_ONCE", 5)
    return known


def test_a_large_index_is_not_written_again_and_again(pictures, keeps, monkeypatch):
    open_split(pictures, "train")
    assert keeps == [5, 63]  # after the first part, and at the end
    keeps.clear()
    monkeypatch.setattr("scale_smog.data.folder_dataset.KEEP_SHARE_FACTOR", -1)
    monkeypatch.setenv("SCALE_SMOG_CACHE", str(pictures.parent / "cache"))
    open_split(pictures, "train")
    assert keeps == [*range(5, 63, 5), 63]


def test_a_start_that_an_error_ends_keeps_what_it_has_seen(pictures, keeps, decoded, monkeypatch):
    real = FolderDataset.__init__.__globals__["_content"]

    def fail(path):
        if path.endswith("turned.jpg"):
            raise UserError("cannot read it")
        return real(path)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read it"):
        patch.setattr("scale_smog.data.folder_dataset._content", fail)
        open_split(pictures, "train")
    assert keeps[0] == 5 and len(keeps) == 2 and keeps[1] >= 30  # all parts before its own
    decoded.clear()
    assert open_split(pictures, "train").num_samples == 63 and len(decoded) == 63 - keeps[1]


def test_a_long_look_is_announced_once(pictures, monkeypatch, capsys):
    said = (
        f"looking at 63 images of {pictures}, once; a start that is ended meanwhile goes on from "
        "there\n"
    )
    monkeypatch.setattr("scale_smog.data.folder_dataset.IMAGES_AT_ONCE", 62)
    open_split(pictures, "train")
    assert capsys.readouterr().err.count(said) == 1
    open_split(pictures, "train")
    assert "looking at" not in capsys.readouterr().err
    monkeypatch.setattr("scale_smog.data.folder_dataset.IMAGES_AT_ONCE", 63)
    monkeypatch.setenv("SCALE_SMOG_CACHE", str(pictures.parent / "cache"))
    open_split(pictures, "train")
    assert said not in capsys.readouterr().err


def test_an_image_that_changes_under_a_run_is_named(pictures):
    dataset = open_split(pictures, "train")
    path = pictures / dataset.names[7]
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk would
    with pytest.raises(UserError, match=f"{path} has changed"):
        open_split(pictures, "train").read(7)
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read {path}: No such file"):
        dataset.read(7)


def test_damaged_images_are_left_out_and_named_each_time(pictures):
    path = pictures / "c" / "00.jpg"
    path.write_bytes(path.read_bytes()[:300])
    for _ in range(2):
        dataset = open_split(pictures, "train")
        assert dataset.num_samples == 62 and "c/00.jpg" not in dataset.names
        (note,) = dataset.notes
        assert f"1 of 63 images are damaged, such as {path}: " in note and "left out" in note
        assert note in describe(pictures)
    for i in range(1, 5):
        (pictures / "d" / f"{2 * i - 1:02d}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 of 63 images are damaged, such as .*00\.jpg"):
        open_split(pictures, "train")


def test_a_cache_that_cannot_be_written_or_read_costs_time_only(pictures, monkeypatch, capsys):
    (pictures.parent / "file").write_text("")
    monkeypatch.setenv("SCALE_SMOG_CACHE", str(pictures.parent / "file"))
    first = open_split(pictures, "train").sha256
    assert "the next start looks at every image again" in capsys.readouterr().err
    cache = pictures.parent / "cache"
    monkeypatch.setenv("SCALE_SMOG_CACHE", str(cache))
    assert open_split(pictures, "train").sha256 == first
    (index,) = cache.glob("*.npz")
    index.write_bytes(index.read_bytes()[:100])
    assert open_split(pictures, "train").sha256 == first


def test_slow_disks_and_images_that_are_rewritten_are_worth_a_word(pictures, monkeypatch):
    assert open_split(pictures, "train").notes == []
    monkeypatch.setattr("scale_smog.data.folder_dataset.SLOW_OPENING_MS", 0.0)
    monkeypatch.setattr("scale_smog.data.folder_dataset.MANY_REWRITTEN", 0.01)
    monkeypatch.setenv("SCALE_SMOG_CACHE", str(pictures.parent / "cache"))
    opening, rewritten = open_split(pictures, "train").notes
    assert "opening an image takes" in opening and "3 of 63 images" in rewritten


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(checkpoint.list_checkpoints(run_dir)[-1])
    return {name: x.clone() for name, x in tensors.items()}  # they are a view of the file


def test_a_stopped_run_on_a_folder_goes_on_to_the_same_bits_also_elsewhere(pictures, tmp_path):
    every_step = "run.checkpoint_every=1"
    pretrain(small_recipe(tmp_path, pictures, every_step))
    whole = final_state(tmp_path / "run")
    for folder in checkpoint.list_checkpoints(tmp_path / "run")[3:]:
        shutil.rmtree(folder)
    pictures.rename(tmp_path / "moved")
    (tmp_path / "moved" / "c" / "cut.jpg").write_bytes(b"")  # left out: the images are the same
    pretrain(small_recipe(tmp_path, tmp_path / "moved", every_step))
    again = final_state(tmp_path / "run")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    (tmp_path / "moved" / "c" / "00.jpg").write_bytes(jpeg(40, 30, 999))
    with pytest.raises(UserError, match="was trained on another dataset"):
        pretrain(small_recipe(tmp_path, tmp_path / "moved", every_step))


def test_of_those_that_start_at_once_one_looks_at_the_images(pictures, decoded):
    with ThreadPoolExecutor(4) as starters:
        found = starters.map(lambda _: open_split(pictures, "train").sha256, range(4))
    assert len(set(found)) == 1 and len(decoded) == 63


def test_stats_describe_a_folder_like_tars(tmp_path):
    make_dataset(tmp_path)
    folder, tars = describe(tmp_path / "source-train"), describe(tmp_path / "tars")
    assert folder.splitlines()[0] == "split train: 40 images in a folder"
    (start,) = (i for i, line in enumerate(tars.splitlines()) if line.startswith("split train"))
    assert folder.splitlines()[1:] == tars.splitlines()[start + 1 :][: len(folder.splitlines()) - 1]
