"""The malformed-input suite: what is damaged or hostile is named, and nothing else is lost."""

import io
import json
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from images import jpeg
from PIL import Image

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.verify import verify_folder
from scale_smog.errors import UserError

ROOT = Path(__file__).parents[2]
NUM_GOOD = 6


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def plain(mode: str, width: int = 20, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 90)).convert(mode)


GREY_16 = Image.fromarray(np.full((16, 20), 40_000, dtype=np.uint16))
# File name: content, and whether it can be kept.
IMAGES = {
    "truncated.jpg": (jpeg(60, 50, 0)[:-200], False),
    "zero.jpg": (b"", False),
    "garbage.png": (b"no picture" * 40, False),
    "animal.gif": (encoded(plain("P"), "GIF"), True),
    "print.jpg": (encoded(plain("CMYK"), "JPEG"), True),
    "deep.png": (encoded(GREY_16, "PNG"), True),
    "dot.png": (encoded(plain("RGB", 1, 1), "PNG"), True),
    "long.png": (encoded(plain("RGB", 30_000, 3), "PNG"), True),
    "bild-äöü-猫.jpg": (jpeg(20, 16, 1), True),
}


@pytest.fixture
def good(tmp_path) -> Path:
    """A flat folder of six sound images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(NUM_GOOD):
        (folder / f"{i}.jpg").write_bytes(jpeg(30, 30, i))
    return folder


def quarantined(out: Path) -> dict[str, str]:
    lines = (out / "train-quarantine.jsonl").read_text().splitlines()
    return {line["file"]: line["reason"] for line in map(json.loads, lines)}


def every_sample_loads(out: Path) -> int:
    """How many samples all views can be made of."""
    dataset = TarDataset(out, "train")
    views = training_views(DataConfig(path="", large_px=16), AugmentConfig())
    source = BatchSource(dataset, EpochPlan(dataset.num_samples, 1), views, 0, 0, 1)
    steps = range(dataset.num_samples)
    batches = list(TorchLoader(source, steps, 0, torch.device("cpu")))
    assert all(torch.isfinite(batch.large[0]).all() for batch in batches)
    return len(batches)


@pytest.mark.parametrize("name", IMAGES)
def test_each_odd_image_is_kept_or_named_and_costs_no_other(good, tmp_path, name):
    content, can_be_kept = IMAGES[name]
    (good / name).write_bytes(content)
    shard_folder(good, tmp_path / "out", workers=1, max_bad=0.5)
    assert list(quarantined(tmp_path / "out")) == ([] if can_be_kept else [name])
    assert every_sample_loads(tmp_path / "out") == NUM_GOOD + can_be_kept
    assert verify_folder(tmp_path / "out") == []


# ---------------------------------------------------------------------------------- others' tars


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


HOSTILE = {
    "000009.pickle": {},
    "000009.pyd": {},
    "../000009.jpg": {},
    "/tmp/000009.jpg": {},
    "000009.jpg": {"type": tarfile.SYMTYPE, "linkname": "000000.jpg", "size": 0},
    "000008.jpg": {"type": tarfile.LNKTYPE, "linkname": "000000.jpg", "size": 0},
    "000007.jpg": {"type": tarfile.CHRTYPE, "size": 0},
    "000006.jpg": {"type": tarfile.FIFOTYPE, "size": 0},
}


def write_tar(path: Path, extra=(), tar_format: int = tarfile.USTAR_FORMAT) -> None:
    """Six sound samples, then `extra`: (name, content, fields)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for i in range(NUM_GOOD):
            add(tar, f"{i:06d}.jpg", jpeg(30, 30, i))
            add(tar, f"{i:06d}.cls", str(i % 2).encode())
        for name, content, fields in extra:
            add(tar, name, content, **fields)


def by_sharding(tars: Path, out: Path) -> None:
    shard_folder(tars / "*.tar", out, workers=1, max_bad=0.9)


def by_indexing(tars: Path, out: Path) -> None:
    shutil.copytree(tars, out)
    index_folder(out, max_bad=0.9)


READ_BY = pytest.mark.parametrize("read", [by_sharding, by_indexing])


@READ_BY
def test_hostile_members_are_refused_by_name_and_never_run(tmp_path, read):
    canary = tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    extra = [(name, b"" if fields else content, fields) for name, fields in HOSTILE.items()]
    write_tar(tmp_path / "tars" / "a.tar", extra)
    read(tmp_path / "tars", tmp_path / "out")
    assert set(quarantined(tmp_path / "out")) == {f"a.tar#{name}" for name in HOSTILE}
    assert every_sample_loads(tmp_path / "out") == NUM_GOOD
    assert verify_folder(tmp_path / "out") == []
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()  # the canary was able to sing


@READ_BY
def test_a_truncated_tar_keeps_what_is_whole(tmp_path, read):
    path = tmp_path / "tars" / "a.tar"
    write_tar(path)
    with tarfile.open(path) as tar:
        last = tar.getmember(f"{NUM_GOOD - 1:06d}.jpg")
    path.write_bytes(path.read_bytes()[: last.offset_data + 100])
    read(tmp_path / "tars", tmp_path / "out")
    assert any("truncated" in reason for reason in quarantined(tmp_path / "out").values())
    assert every_sample_loads(tmp_path / "out") == NUM_GOOD - 1


@READ_BY
def test_duplicate_keys_are_named(tmp_path, read):
    write_tar(tmp_path / "tars" / "a.tar", [("000002.jpg", jpeg(30, 30, 9), {})])
    read(tmp_path / "tars", tmp_path / "out")
    assert "a.tar#000002.jpg" in quarantined(tmp_path / "out")
    assert every_sample_loads(tmp_path / "out") == NUM_GOOD - 1


@READ_BY
def test_pax_names_are_read(tmp_path, read):
    name = "dir/" + "ü" * 120 + ".jpg"
    write_tar(tmp_path / "tars" / "a.tar", [(name, jpeg(9, 9, 9), {})], tarfile.PAX_FORMAT)
    read(tmp_path / "tars", tmp_path / "out")
    assert quarantined(tmp_path / "out") == {}
    assert every_sample_loads(tmp_path / "out") == NUM_GOOD + 1


@READ_BY
def test_what_is_no_tar_is_one_line(tmp_path, read):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"cannot read .*a\.tar as an uncompressed tar"):
        read(tmp_path / "tars", tmp_path / "out")


def test_a_stale_or_foreign_index_is_named(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar")
    write_tar(tmp_path / "tars" / "b.tar", [("000009.jpg", jpeg(9, 9, 9), {})])
    by_indexing(tmp_path / "tars", tmp_path / "out")
    shutil.copy(tmp_path / "out" / "a.idx", tmp_path / "out" / "b.idx")
    problems = verify_folder(tmp_path / "out")
    assert "b.idx: does not index b.tar" in problems
    assert all(problem.startswith("b.idx") for problem in problems)


# ----------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_line_and_loses_nothing_finished(good, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (good / "large.png").write_bytes(encoded(Image.fromarray(noise), "PNG"))
    program = str(ROOT / "data_tools" / "shard.py")
    out = tmp_path / "out"
    command = [sys.executable, program, str(good), str(out), "--shard-samples=1", "--workers=1"]

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, preexec_fn=no_large_files, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr and "train-00000" in done.stderr
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True)
    shard_folder(good, tmp_path / "fresh", shard_samples=1, workers=1)
    for path in (tmp_path / "fresh").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
