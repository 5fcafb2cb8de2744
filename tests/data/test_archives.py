"""Archives as their makers publish them, and columns and keys of many names: labels are right."""

import argparse
import json
import tarfile
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from field_sets import refusal, samples, sharded, write_tar
from images import jpeg, photo
from PIL import Image

from scale_smog.cli.data_tools import shard
from scale_smog.data import TarDataset
from scale_smog.data.prepare import index, verify
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.sources import SourceOptions, open_source

WNIDS = ("n01440764", "n01443537", "n02102040")
# The devkit's numbers are not in the order of the ids.
NUMBERS = {1: "n02102040", 2: "n01440764", 3: "n01443537"}


@pytest.fixture(autouse=True)
def sets_are_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of two tars starts no worker processes; test_sources.py keeps those."""
    for module in (index, verify):
        monkeypatch.setattr(module, "num_usable_cores", lambda: 1)


def truth(dataset: TarDataset) -> dict[bytes, str]:
    """Class of each image."""
    return {dataset.read(i): dataset.classes[label] for i, label in enumerate(dataset.labels)}


# ImageNet


def train_tar(folder: Path) -> dict[bytes, str]:
    """ILSVRC2012_img_train.tar of three classes of four; what is in it."""
    tars, expected = {}, {}
    for c, wnid in enumerate(reversed(WNIDS)):
        members = {f"{wnid}_{i * 37}.JPEG": jpeg(24 + i, 20, 10 * c + i) for i in range(4)}
        expected |= dict.fromkeys(members.values(), wnid)
        tars[f"{wnid}.tar"] = write_tar(folder / "inner" / f"{wnid}.tar", members).read_bytes()
    write_tar(folder / "ILSVRC2012_img_train.tar", tars)
    return expected


@pytest.fixture
def val_tar(tmp_path) -> tuple[Path, dict[bytes, str]]:
    """ILSVRC2012_img_val.tar of six images, not in the order of their names."""
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (5, 1, 6, 2, 4, 3)]
    members = {name: jpeg(24, 20 + i, 100 + i) for i, name in enumerate(names)}
    expected = {members[n]: NUMBERS[1 + int(n[-6]) % 3] for n in names}
    return write_tar(tmp_path / "ILSVRC2012_img_val.tar", members), expected


def devkit(folder: Path, numbers: list[int]) -> Path:
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words, of it", 0) for number, wnid in NUMBERS.items()]
    synsets = np.array([*rows, (1001, "n00001740", "entity", 3)], dtype=fields)
    meta = BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    path = folder / "ILSVRC2012_devkit_t12.tar.gz"
    files = {
        "readme.txt": b"words",
        "data/meta.mat": meta.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, numbers)).encode(),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def test_imagenets_training_tar_of_tars_is_sharded_as_it_is(tmp_path):
    expected = train_tar(tmp_path)
    dataset = sharded(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out", shard_samples=5)
    assert truth(dataset) == expected and dataset.classes == WNIDS


def test_imagenets_validation_tar_takes_its_labels_from_the_devkit(tmp_path, val_tar):
    tar, expected = val_tar
    assert "put ILSVRC2012_devkit_t12.tar.gz beside it" in refusal(open_source, tar)
    devkit(tmp_path, [1 + i % 3 for i in range(1, 7)])
    assert truth(sharded(tar, tmp_path / "out", split="val")) == expected
    train_tar(tmp_path)  # the same classes: both splits are one dataset
    sharded(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out")
    devkit(tmp_path, [1, 2])
    assert "2 labels for 6 images" in refusal(open_source, tar)
    devkit(tmp_path, [1, 2, 3, 1, 2, 9])
    assert "meta.mat does not know the number 9" in refusal(open_source, tar)


LISTS = {  # of n: number of the image, and its class
    "torch's": lambda n, wnid: f"ILSVRC2012_val_{n:08d}.JPEG {wnid}",
    "kaggle's": lambda n, wnid: f"ILSVRC2012_val_{n:08d},{wnid} 85 1 499 272",
    "tab": lambda n, wnid: f"val/ILSVRC2012_val_{n:08d}.JPEG\t{wnid}",
    "in order": lambda n, wnid: wnid,
}


@pytest.mark.parametrize("kind", LISTS)
def test_imagenets_validation_tar_takes_its_labels_from_a_plain_list(tmp_path, val_tar, kind):
    tar, expected = val_tar
    lines = [LISTS[kind](n, NUMBERS[1 + n % 3]) for n in range(1, 7)]
    header = [] if kind == "in order" else ["ImageId,PredictionString"]
    (tmp_path / "labels.txt").write_text("\n".join([*header, *lines, ""]))
    about = SourceOptions(labels=str(tmp_path / "labels.txt"))
    assert truth(sharded(tar, tmp_path / "out", source_options=about)) == expected
    (tmp_path / "labels.txt").write_text("\n".join(lines[:-1]))
    line = refusal(open_source, tar, about)
    assert "labels for 6 images" in line or "does not name ILSVRC2012_val_00000006.JPEG" in line


def test_a_tar_of_tars_of_another_name_says_which_layout_to_give(tmp_path):
    expected = train_tar(tmp_path)
    other = (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "train.tar")
    assert "it holds tars; ImageNet's are read by --layout imagenet" in refusal(open_source, other)
    about = SourceOptions(layout="imagenet")
    assert truth(sharded(other, tmp_path / "out", source_options=about)) == expected
    write_tar(tmp_path / "cats.tar", {"cats.tar": b""})
    assert "is not the tar of a WordNet id" in refusal(open_source, tmp_path / "cats.tar", about)


def test_the_program_hands_on_what_is_said_about_a_source(tmp_path, val_tar):
    tar, expected = val_tar
    other = tar.rename(tmp_path / "val.tar")
    lines = [LISTS["in order"](n, NUMBERS[1 + n % 3]) for n in range(1, 7)]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    words = [str(other), str(tmp_path / "out"), "--split=val", "--layout=imagenet", "--workers=1"]
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    shard.run(parser.parse_args([*words, f"--labels={tmp_path / 'labels.txt'}"]))
    assert truth(TarDataset(tmp_path / "out", "val")) == expected
    said = parser.parse_args(["a", "b", "--image-column=x", "--label-column=y", "--label-key=z"])
    assert (said.image_column, said.label_column, said.label_key) == ("x", "y", "z")


# CIFAR-10


def cifar(folder: Path, num: int = 8) -> Mapping[str, list[tuple[np.ndarray, str]]]:
    """cifar-10-binary.tar.gz of so many images a batch; what is in it."""
    names = ["airplane", "automobile", "bird"]
    files = {"batches.meta.txt": "\n".join([*names, ""]).encode(), "readme.html": b"words"}
    expected: dict[str, list[tuple[np.ndarray, str]]] = {"train": [], "test": []}
    for batch in ("data_batch_1", "data_batch_2", "test_batch"):
        content = b""
        for i in range(num):
            pixels = np.asarray(photo(32, 32, len(files) * 100 + i))  # [32, 32, 3]
            content += bytes([i % 3]) + pixels.transpose(2, 0, 1).tobytes()
            expected["test" if "test" in batch else "train"].append((pixels, names[i % 3]))
        files[f"{batch}.bin"] = content
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_10s_binary_archive_gives_its_pixels_and_labels(tmp_path, split):
    expected = cifar(tmp_path)[split]
    source, about = tmp_path / "cifar-10-binary.tar.gz", SourceOptions(split=split)
    dataset = sharded(source, tmp_path / "out", split=split, source_options=about, shard_samples=5)
    assert dataset.num_samples == len(expected)
    found = {
        np.asarray(Image.open(BytesIO(content))).tobytes(): name
        for content, name in truth(dataset).items()
    }
    assert found == {pixels.tobytes(): name for pixels, name in expected}


def test_an_archive_that_is_not_cifar_10s_is_refused(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"words")
    assert "cannot read" in refusal(open_source, tmp_path / "cifar-10-binary.tar.gz")
    write_tar(tmp_path / "x.tar", samples("01"))
    about = SourceOptions(layout="cifar10")
    assert "is not CIFAR-10's binary archive" in refusal(open_source, tmp_path / "x.tar", about)
    about = SourceOptions(layout="cifar10", split="dev")
    assert "splits train and test, not dev" in refusal(open_source, tmp_path / "x.tar", about)


# Parquet

COLUMNS = {  # (image, label): what is said about them
    ("image", "label"): SourceOptions(),
    ("img", "fine_label"): SourceOptions(),
    ("jpg", "cls"): SourceOptions(),
    ("photo", "kind"): SourceOptions(image_column="photo", label_column="kind"),
}


def parquet_files(folder: Path, image: str, label: str) -> dict[bytes, str]:
    """Three files of two row groups of four images; what is in them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    expected = {}
    for file in range(3):
        contents = [jpeg(20, 16, 10 * file + i) for i in range(8)]
        numbers = [(file + i) % 3 for i in range(8)]
        table = pa.table(
            {
                "coarse_label": [0] * 8,
                image: [{"bytes": content, "path": None} for content in contents],
                label: numbers,
            }
        )
        features = {label: {"_type": "ClassLabel", "names": list(WNIDS)}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
        pq.write_table(table, folder / f"train-{file}.parquet", row_group_size=4)
        expected |= {c: WNIDS[n] for c, n in zip(contents, numbers, strict=True)}
    return expected


@pytest.mark.parametrize("columns", COLUMNS, ids=" ".join)
def test_parquet_of_many_column_names_is_sharded_without_a_copy_of_it(
    tmp_path, monkeypatch, columns
):
    expected = parquet_files(tmp_path, *columns)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # no room there is needed
    pattern, about = str(tmp_path / "train-*.parquet"), COLUMNS[columns]
    dataset = sharded(pattern, tmp_path / "out", source_options=about, shard_samples=8)
    assert truth(dataset) == expected and dataset.classes == WNIDS


def test_a_shard_of_parquet_is_of_few_row_groups_from_anywhere(tmp_path):
    parquet_files(tmp_path, "image", "label")
    source = open_source(str(tmp_path / "train-*.parquet"))
    assert len(set(source.blocks)) == 6
    dataset = sharded(str(tmp_path / "train-*.parquet"), tmp_path / "out", shard_samples=8)
    block_of = {source.read(x.name): b for x, b in zip(source.images, source.blocks, strict=True)}
    blocks = [block_of[dataset.read(i)] for i in range(24)]
    assert [len(set(blocks[i : i + 8])) for i in (0, 8, 16)] == [2, 2, 2]
    assert blocks != sorted(blocks)  # the files' order is not kept


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    parquet_files(tmp_path, "photo", "label")
    line = refusal(open_source, tmp_path / "train-0.parquet")
    assert "it has coarse_label, photo, label: name it by --image-column" in line
    about = SourceOptions(image_column="photo", label_column="kind")
    line = refusal(open_source, tmp_path / "train-0.parquet", about)
    assert "no column 'kind'; it has coarse_label, photo, label" in line


# Tars with descriptions


@pytest.mark.parametrize("labels", [[2, 0, 1, 2], ["dog", "cat", "dog", "emu"]], ids=str)
def test_labels_of_tars_may_lie_in_json_under_a_key(tmp_path, labels):
    members, expected = {}, {}
    for i, label in enumerate(labels):
        members[f"{i}.jpg"] = jpeg(20, 16, i)
        members[f"{i}.json"] = json.dumps({"label": 9, "kind": label, "text": "words"}).encode()
        expected[members[f"{i}.jpg"]] = str(label)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", dict(list(members.items())[:4]))
    write_tar(tmp_path / "tars" / "1.tar", dict(list(members.items())[4:]))
    about = SourceOptions(label_key="kind")
    write_tar(tmp_path / "tars" / "2.tar", {"words.txt": b"no image"})
    dataset = sharded(tmp_path / "tars", tmp_path / "out", source_options=about)
    assert truth(dataset) == expected
    line = refusal(open_source, tmp_path / "tars", SourceOptions(label_key="species"))
    assert "no .json member of" in line and "'species'" in line


def test_tars_without_an_image_are_refused_in_a_line(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", {"words.txt": b"no image"})
    assert "no images" in refusal(index_folder, tmp_path / "tars")
