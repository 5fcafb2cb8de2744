"""CSV lists, parquet files and tars give the same dataset as the folder they describe."""

import csv
import json
import os
import runpy
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from field_sets import write_tar
from images import jpeg
from PIL import ExifTags, Image

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.build import build_training_loader
from scale_smog.data.manifest import load_manifest, manifest_sha256
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.sources import open_source
from scale_smog.data.prepare.stats import describe, draw_samples
from scale_smog.data.prepare.verify import verify_folder
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.errors import UserError

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 10
CLASSES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two class folders of five images each."""
    for i in range(NUM_IMAGES):
        path = tmp_path / "images" / CLASSES[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(30 + i, 20, i))
    return tmp_path / "images"


def as_csv(folder: Path, place: Path) -> Path:
    with open(place / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for path in sorted(folder.rglob("*.jpg")):
            rows.writerow([path.relative_to(place).as_posix(), path.parent.name])
    return place / "list.csv"


def as_parquet(folder: Path, place: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [
        {"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.rglob("*.jpg"))
    ]
    labels = [CLASSES.index(path.parent.name) for path in sorted(folder.rglob("*.jpg"))]
    described = {"info": {"features": {"label": {"names": CLASSES}}}}
    table = pyarrow.table({"image": images, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    parquet.write_table(table, place / "a.parquet", row_group_size=3)
    return place / "a.parquet"


def as_tars(folder: Path, place: Path) -> Path:
    shard_folder(folder, place / "tars", workers=1, shard_samples=4)
    return place / "tars" / "*.tar"


def content(out: Path) -> set[tuple[bytes, int]]:
    dataset = TarDataset(out, "train")
    return {(dataset.read(i), int(dataset.labels[i])) for i in range(dataset.num_samples)}


def test_each_file_of_a_list_is_looked_at_once_for_its_size(folder, tmp_path, monkeypatch):
    path, seen, real = as_csv(folder, tmp_path), [], os.stat

    def stat(path, *args, **options):
        seen.append(str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    source = open_source(path)
    monkeypatch.undo()
    files = {str(file): file.stat().st_size for file in folder.rglob("*.jpg")}
    assert all(seen.count(file) == 1 for file in files)
    assert sorted(image.num_bytes for image in source.images) == sorted(files.values())


@pytest.mark.parametrize("make", [as_csv, as_parquet, as_tars])
def test_every_kind_of_source_gives_the_folders_images_and_labels(folder, tmp_path, make):
    source = make(folder, tmp_path)
    shard_folder(source, tmp_path / "out", workers=1, shard_samples=3)
    shard_folder(folder, tmp_path / "expected", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert load_manifest(tmp_path / "out").classes in (CLASSES, ("0", "1"))
    assert verify_folder(tmp_path / "out") == []
    shard_folder(source, tmp_path / "two", workers=2, shard_samples=3)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_tars_of_one_name_in_several_folders_keep_their_images_apart(folder, tmp_path):
    for name in CLASSES:
        shard_folder(folder / name, tmp_path / name, workers=1)
    source = open_source(str(tmp_path / "*" / "train-000000.tar"))
    contents = {source.read(image.name) for image in source.images}
    assert contents == {path.read_bytes() for path in folder.rglob("*.jpg")}


def test_images_lie_as_their_sizes_say_and_no_loader_turns_them(tmp_path):
    """Tars that others made hold images that EXIF wants turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(4):
            encoded = BytesIO()
            Image.open(BytesIO(jpeg(80, 40, i))).save(encoded, "JPEG", exif=exif)
            for name, content in ((f"{i}.jpg", encoded.getvalue()), (f"{i}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    index_folder(tmp_path)
    dataset = TarDataset(tmp_path, "train")
    assert set(zip(dataset.widths, dataset.heights, strict=True)) == {(80, 40)}
    views = {}
    for loader, px in (("torch", 32), ("dali", 32), ("torch", 96), ("dali", 96)):
        keys = {"global_batch": 4, "workers": 0, "large_px": px, "loader": loader}
        data = DataConfig.model_validate({"path": str(tmp_path), **keys})
        random = training_views(data, AugmentConfig(solarize=(0, 0)))
        source = build_training_loader(
            data, random, dataset, EpochPlan(4, 4, seed=0), range(1), torch.device("cpu")
        )
        views[loader, px] = next(iter(source)).large[0]
    for px in (32, 96):
        assert (views["torch", px] - views["dali", px]).abs().mean() < 0.02


def test_pixels_of_16_bits_are_put_aside_by_the_index(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        deep = BytesIO()
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
        for name, content in (("0.jpg", jpeg(20, 20, 0)), ("1.png", deep.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    index_folder(tmp_path, max_bad=0.5)
    assert TarDataset(tmp_path, "train").num_samples == 1
    assert "16 bits a channel" in (tmp_path / "train-quarantine.jsonl").read_text()


def animation() -> bytes:
    """Two frames as a WebP file, which torchvision does not decode."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    content = BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:])
    return content.getvalue()


def test_an_animation_is_put_aside_by_the_index(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(20, 20, 0), "1.webp": animation()})
    index_folder(tmp_path, max_bad=0.5)
    assert TarDataset(tmp_path, "train").num_samples == 1
    assert "an animated WEBP; write the tars" in (tmp_path / "train-quarantine.jsonl").read_text()


@pytest.mark.parametrize(("loader", "workers"), [("torch", 0), ("torch", 1), ("memory", 0)])
def test_an_image_that_a_loader_cannot_decode_is_one_line_with_its_id_and_tar(
    tmp_path, monkeypatch, loader, workers
):
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(20, 20, 0), "1.webp": animation()})
    monkeypatch.setattr("scale_smog.data.prepare.index.why_not_as_stored", lambda *_: "")
    index_folder(tmp_path)
    keys = {"global_batch": 2, "workers": workers, "large_px": 16, "loader": loader}
    data = DataConfig.model_validate({"path": str(tmp_path), **keys})
    dataset, plan = TarDataset(tmp_path, "train"), EpochPlan(2, 2)
    views = training_views(data, AugmentConfig())
    with pytest.raises(UserError) as error:
        list(build_training_loader(data, views, dataset, plan, range(1), torch.device("cpu")))
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/a.tar: sample 000000000001 (id 1) cannot be decoded: ")
    assert "\n" not in line


def test_a_list_names_its_missing_column_or_file(tmp_path):
    (tmp_path / "a.csv").write_text("file,label\nx.jpg,1\n")
    with pytest.raises(UserError, match=r"a\.csv has no column 'path'; it has file, label"):
        open_source(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("path\nnowhere.jpg\n")
    with pytest.raises(UserError, match=r"b\.csv, line 2: no file .*nowhere\.jpg"):
        open_source(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"no file .*nothing-\*\.tar"):
        open_source(tmp_path / "nothing-*.tar")


def test_numbers_as_labels_keep_their_order(folder, tmp_path):
    path = next(folder.rglob("*.jpg"))
    lines = "".join(f"{path},{label}\n" for label in (10, 9, 2))
    (tmp_path / "a.csv").write_text("path,label\n" + lines)
    source = open_source(tmp_path / "a.csv")
    assert source.classes == ("2", "9", "10")
    assert [image.label for image in source.images] == [2, 1, 0]


def test_reencoding_makes_jpegs_and_unchecked_shards_hold_the_same_files(folder, tmp_path):
    shard_folder(folder, tmp_path / "checked", workers=1)
    shard_folder(folder, tmp_path / "unchecked", workers=1, full_check=False)
    shard_folder(folder, tmp_path / "small", workers=1, reencode=20)
    assert content(tmp_path / "checked") == content(tmp_path / "unchecked")
    sizes = [sum(len(data) for data, _ in content(tmp_path / n)) for n in ("checked", "small")]
    assert sizes[1] < 0.8 * sizes[0]  # at quality 90 they were
    with pytest.raises(UserError, match="reencode is 96"):
        shard_folder(folder, tmp_path / "other", reencode=96)


def test_an_index_of_our_own_tars_is_our_index(folder, tmp_path):
    shard_folder(folder, tmp_path / "out", workers=1, shard_samples=4)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.idx")}
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    index_folder(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.idx")} == before
    assert verify_folder(tmp_path / "out") == []


def test_a_new_split_leaves_the_hash_of_the_others(folder, tmp_path):
    shard_folder(folder, tmp_path / "out", workers=1)
    before = manifest_sha256(tmp_path / "out")
    shard_folder(folder, tmp_path / "out", workers=1, split="test")
    assert manifest_sha256(tmp_path / "out") == before
    assert manifest_sha256(tmp_path / "out", "test") != before


def test_stats_count_and_draw(folder, tmp_path, monkeypatch, capsys):
    shard_folder(folder, tmp_path / "out", workers=1)
    text = describe(tmp_path / "out")
    assert "split train: 10 images in 1 shards" in text and "2 classes" in text
    assert "median 20, 20-20" in text
    draw_samples(tmp_path / "out", tmp_path / "grid.png", num_images=3)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (3 * 228, 2 * 228 + 4 * 100, 3)
    assert sheet[:224, :224].std() > 5 and (sheet[224:228] == 255).all()

    monkeypatch.setattr(sys, "argv", ["stats.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "data_tools" / "stats.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == text
