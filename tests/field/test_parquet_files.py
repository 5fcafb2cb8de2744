"""Parquet files as people have them: each kind, and what comes of it."""

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from field_sets import labels_by_class, quarantine, refusal, sharded
from images import jpeg

from scale_smog.data.prepare.sources import open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

BYTES = [jpeg(20, 16, i) for i in range(3)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = pa.array([{"bytes": content, "path": "x.jpg"} for content in BYTES], STRUCT)


def a_file(folder: Path, image: Any = IMAGES, label: Any = None, names: Any = None) -> Path:
    """A parquet file of an image column, perhaps a label column and Hugging Face's names."""
    columns = {"image": image} if label is None else {"image": image, "label": label}
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


# Columns of images that are read.
IMAGE_COLUMNS = {
    "struct of bytes and path": IMAGES,
    "struct of bytes": pa.array([{"bytes": x} for x in BYTES], pa.struct([("bytes", pa.binary())])),
    "plain binary": pa.array(BYTES, pa.binary()),
    "large binary": pa.array(BYTES, pa.large_binary()),
    "binary view": pa.array(BYTES, pa.binary_view()),
    "dictionary of binary": pa.array(BYTES).dictionary_encode(),
    "binary in pieces": pa.chunked_array([pa.array([x], pa.binary()) for x in BYTES]),
}


@pytest.mark.parametrize("kind", IMAGE_COLUMNS)
def test_images(tmp_path, kind):
    source = open_source(a_file(tmp_path, IMAGE_COLUMNS[kind]))
    assert [source.read(image.name) for image in source.images] == BYTES


# Columns of labels that are read: (column, classes, label of each row)
LABEL_COLUMNS = {
    "whole numbers": (pa.array([0, 2, 1]), ["0", "1", "2"], [0, 2, 1]),
    "small numbers": (pa.array([0, 2, 1], pa.uint8()), ["0", "1", "2"], [0, 2, 1]),
    "-1 for none": (pa.array([0, -1, 1]), ["0", "1"], [0, -1, 1]),
    "-100 for none": (pa.array([0, -100, 1]), ["0", "1"], [0, -1, 1]),
    "null for none": (pa.array([0, None, 1]), ["0", "1"], [0, -1, 1]),
    "all null": (pa.nulls(3), [], [-1, -1, -1]),
    "floats": (pa.array([0.0, 1.0, 1.0]), ["0", "1"], [0, 1, 1]),
    "floats, nan for none": (pa.array([0.0, math.nan, 1.0]), ["0", "1"], [0, -1, 1]),
    "decimals": (pa.array([Decimal("0"), Decimal("1"), Decimal("1")]), ["0", "1"], [0, 1, 1]),
    "true and false": (pa.array([True, False, True]), ["0", "1"], [1, 0, 1]),
    "names": (pa.array(["dog", "cat", "dog"]), ["cat", "dog"], [1, 0, 1]),
    "names with blanks": (pa.array(["dog", " dog", None]), ["dog"], [0, 0, -1]),
    "numbers as text": (pa.array(["10", "9", "-1"]), ["9", "10"], [1, 0, -1]),
    "dictionary of names": (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
    "dictionary of numbers": (pa.array([1, 0, 1]).dictionary_encode(), ["0", "1"], [1, 0, 1]),
}


@pytest.mark.parametrize("kind", LABEL_COLUMNS)
def test_labels(tmp_path, kind):
    column, classes, labels = LABEL_COLUMNS[kind]
    source = open_source(a_file(tmp_path, label=column))
    assert list(source.classes) == classes
    assert [image.label for image in source.images] == labels


# What is refused: (image column, label column, words of the one line)
REFUSED = {
    "image is text": (pa.array(["aGVsbG8="] * 3), None, ["'image' is string, not the bytes"]),
    "image is a number": (pa.array([1, 2, 3]), None, ["'image' is int64"]),
    "a list of images": (
        pa.array([[x] for x in BYTES]),
        None,
        ["'image' is list", "not the bytes"],
    ),
    "pixels": (pa.array([[[0, 1]]] * 3), None, ["'image' is list"]),
    "a struct without bytes": (pa.array([{"path": "x"}] * 3), None, ["no 'bytes'; it has path"]),
    "bytes as text": (pa.array([{"bytes": "x"}] * 3), None, ["'image' is string"]),
    "a list of labels": (IMAGES, pa.array([[0, 1]] * 3), ["'label' is list"]),
    "a struct of labels": (IMAGES, pa.array([{"id": 0}] * 3), ["'label' is struct"]),
    "a label of half": (IMAGES, pa.array([0, 0.5, 1]), ["a.parquet#0.1", "not a whole number"]),
    "a label without end": (IMAGES, pa.array([0, math.inf, 1]), ["not a whole number: 'inf'"]),
    "a label of fifty million": (
        IMAGES,
        pa.array([0, 1, 50_000_000]),
        ["beyond 1,000,000 classes"],
    ),
    "a label of 2**63": (IMAGES, pa.array([0, 1, 2**63], pa.uint64()), ["beyond 1,000,000"]),
    "bytes as a label": (IMAGES, pa.array([b"0", b"1", b"2"]), ["not a whole number"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind):
    image, label, words = REFUSED[kind]
    line = refusal(open_source, a_file(tmp_path, image, label))
    assert not [word for word in ["a.parquet", *words] if word not in line], line


def test_labels_beyond_the_files_names_are_refused(tmp_path):
    line = refusal(open_source, a_file(tmp_path, label=pa.array([0, 5, 1]), names=["a", "b"]))
    assert "a.parquet#0.1: label 5, but the file names 2 classes" in line


@pytest.mark.parametrize("names", [None, [], "ab", {"a": 0}, [["a"]], 7])
def test_names_in_another_form_than_hugging_faces_do_no_harm(tmp_path, names):
    path = a_file(tmp_path, label=pa.array([0, 0, 0]), names=names)
    assert len(open_source(path).classes) in (1, 2)


def test_a_description_that_is_no_json_does_no_harm(tmp_path):
    table = pa.table({"image": IMAGES}).replace_schema_metadata({"huggingface": "{"})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(open_source(tmp_path / "a.parquet").images) == 3


def test_files_that_name_other_classes_are_refused(tmp_path):
    for name, names in (("one", ["a", "b"]), ("two", ["b", "a"])):
        (tmp_path / name).mkdir()
        a_file(tmp_path / name, label=pa.array([0, 1, 0]), names=names)
    assert "name other classes" in refusal(open_source, str(tmp_path / "*" / "a.parquet"))


def test_only_paths_and_no_bytes_says_so(tmp_path):
    image = pa.array([{"bytes": None, "path": f"/data/{i}.jpg"} for i in range(3)], STRUCT)
    line = refusal(open_source, a_file(tmp_path, image))
    assert "no bytes, only the path '/data/0.jpg'" in line and "store the images" in line


def test_a_row_without_bytes_is_put_aside_by_name(tmp_path):
    rows = [{"bytes": x, "path": None} for x in BYTES * 10]
    rows += [{"bytes": None, "path": "lost.jpg"}]
    dataset = sharded(a_file(tmp_path, pa.array(rows, STRUCT)), tmp_path / "out")
    assert dataset.num_samples == 30
    assert quarantine(tmp_path / "out") == {"a.parquet#0.30": "no bytes, only the path 'lost.jpg'"}


@pytest.mark.parametrize("row", [None, {"bytes": b"", "path": None}, {"bytes": None, "path": None}])
def test_a_row_without_anything_is_put_aside(tmp_path, row):
    rows = [{"bytes": x, "path": None} for x in BYTES * 10]
    out = tmp_path / "out"
    assert sharded(a_file(tmp_path, pa.array([*rows, row], STRUCT)), out).num_samples == 30
    assert list(quarantine(out).values()) == ["empty file"]


def test_a_file_cut_short_or_damaged_is_one_line(tmp_path):
    path = a_file(tmp_path, pa.array(BYTES * 50))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "cannot read" in refusal(open_source, path)
    path.write_bytes(whole[:4] + b"\xff" * 1000 + whole[1004:])
    assert "cannot read" in refusal(open_source, path)
    path.write_bytes(b"")
    assert "cannot read" in refusal(open_source, path)


def test_images_without_a_label_are_counted(tmp_path, capsys):
    path = a_file(tmp_path, label=pa.array([0, -1, None]))
    assert labels_by_class(sharded(path, tmp_path / "out")) == {"0": 1, None: 2}
    assert "2 of 3 images have no label" in capsys.readouterr().err
