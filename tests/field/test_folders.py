"""Folders of images as people have them: each kind, and what comes of it."""

import os
from pathlib import Path

import pytest
from field_sets import (
    labels_by_class,
    quarantine,
    refusal,
    run_tool,
    run_tool_here,
    sharded,
    write_images,
    write_tar,
)
from field_sets import samples as tar_samples

from scale_smog.data.datasets import open_split
from scale_smog.data.image_folder import list_folder
from scale_smog.data.prepare.sources import open_source

# Folders that are splits, not classes.
SPLITS = [
    ("train", "val"),
    ("train", "validation"),
    ("train", "valid"),
    ("training", "testing"),
    ("Train", "Test"),
    ("train", "dev"),
    ("train2017", "val2017"),
    ("train_images", "test_images"),
    ("train_set", "test_set"),
    ("train", "val", "extra"),
    ("train", "test", "unlabeled"),
    ("train", "val", "annotations", "n01440764"),
    ("train",),
    ("validation",),
    ("val", "test"),
]


@pytest.mark.parametrize("folders", SPLITS, ids="+".join)
def test_splits_do_not_become_classes(tmp_path, folders):
    write_images(tmp_path / "set", [f"{name}/cat/1.jpg" for name in folders])
    line = refusal(open_source, tmp_path / "set")
    assert "holds the splits" in line and f"{tmp_path}/set/" in line and "--split" in line


# Folders that are classes, although one has the name of a split.
CLASSES = [
    ("car", "train", "truck"),
    ("test", "quiz"),
    ("evaluation_form", "invoice", "training_plan"),
    ("valley", "trainer", "testament"),
    ("0", "1"),
    ("images", "sets"),
    ("dataset", "other"),
]


@pytest.mark.parametrize("folders", CLASSES, ids="+".join)
def test_a_class_may_have_the_name_of_a_split(tmp_path, folders):
    write_images(tmp_path, [f"{name}/1.jpg" for name in folders])
    assert list_folder(tmp_path).classes == tuple(sorted(folders))


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# Links to folders: where they lie, where they lead, and the images that are listed.
LINKS = {
    "to its parent": ("a/up", "..", ["a/1.jpg", "b/2.jpg"]),
    "to itself": ("a/me", ".", ["a/1.jpg", "b/2.jpg"]),
    "to a parent of the whole": ("a/up", "../../..", ["a/1.jpg", "b/2.jpg"]),
    "to another class": ("a/also", "../b", ["a/1.jpg", "b/2.jpg"]),
    "to nowhere": ("a/gone", "../nowhere", ["a/1.jpg", "b/2.jpg"]),
    "around by itself": ("a/round", "round", ["a/1.jpg", "b/2.jpg"]),
    "to a store outside": ("a/more", "../../store", ["a/1.jpg", "a/more/3.jpg", "b/2.jpg"]),
    "to a hidden store inside": ("a/more", "../.hidden", ["a/1.jpg", "a/more/4.jpg", "b/2.jpg"]),
}


@pytest.mark.parametrize("kind", LINKS)
def test_an_image_comes_once_whatever_links_lead_to_it(tmp_path, kind):
    path, target, names = LINKS[kind]
    write_images(tmp_path / "set", ["a/1.jpg", "b/2.jpg", ".hidden/4.jpg"])
    write_images(tmp_path / "store", ["3.jpg"])
    link(tmp_path / "set" / path, target)
    assert [image.name for image in list_folder(tmp_path / "set").images] == names


def test_two_folders_that_link_to_each_other_end(tmp_path):
    write_images(tmp_path / "set", ["a/1.jpg"])
    write_images(tmp_path / "store", ["3.jpg", "deep/4.jpg"])
    link(tmp_path / "set" / "a" / "store", "../../store")
    link(tmp_path / "store" / "deep" / "back", "..")
    link(tmp_path / "store" / "deep" / "set", "../../set")
    names = [image.name for image in list_folder(tmp_path / "set").images]
    assert names == ["a/1.jpg", "a/store/3.jpg", "a/store/deep/4.jpg"]


def test_links_to_files_and_classes_outside_are_images_like_others(tmp_path):
    write_images(tmp_path / "store", ["x/3.jpg"])
    link(tmp_path / "set" / "cat", "../store/x")
    link(tmp_path / "set" / "dog" / "1.jpg", "../../store/x/3.jpg")
    assert labels_by_class(sharded(tmp_path / "set", tmp_path / "out")) == {"cat": 1, "dog": 1}


def name_of_bytes(name: bytes) -> str:
    return os.fsdecode(name)


# Names that are not UTF-8, or that JSON, CSV and shells treat apart.
NAMES = [
    b"caf\xe9",
    b"\xff\xfe",
    b"new\nline",
    b'quo"te',
    b"back\\slash",
    b"two  blanks",
    b"\xe7\x8c\xab",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name_may_be_a_class_or_an_image_bad_or_good(tmp_path, name):
    text = name_of_bytes(name)
    write_images(tmp_path / "set", [f"{text}/{text}{i}.jpg" for i in range(30)])
    write_images(tmp_path / "set", ["cat/1.jpg"])
    (tmp_path / "set" / text / f"{text}bad.jpg").write_bytes(b"bad")
    dataset = sharded(tmp_path / "set", tmp_path / "out")
    assert sorted(labels_by_class(dataset).values()) == [1, 30]
    (bad,) = quarantine(tmp_path / "out")
    assert bad.endswith("bad.jpg") and bad.encode()
    (tmp_path / "set").rename(tmp_path / "train")
    folder = open_split(tmp_path, "train")
    assert folder.num_samples == 31 and "".join(folder.classes).encode()


def test_a_bad_image_of_a_name_that_is_not_utf_8_is_said_by_the_program(tmp_path):
    write_images(tmp_path / "set", [f"{i}.jpg" for i in range(30)])
    (tmp_path / "set" / name_of_bytes(b"caf\xe9.jpg")).write_bytes(b"bad")
    status, said = run_tool("shard", tmp_path / "set", tmp_path / "out", "--workers=1")
    assert status == 0 and "put aside: caf\\xe9.jpg" in said
    given = (tmp_path / "set", tmp_path / "none", "--workers=1", "--max-bad=0")
    status, said = run_tool_here("shard", *given)
    assert status == 2 and "Traceback" not in said


# Files that are no source: (name, words of the one line)
NO_SOURCES = {
    "a.tar.gz": "packed: unpack it",
    "a.tgz": "packed",
    "a.tar.bz2": "packed",
    "a.tar.xz": "packed",
    "a.tar.zst": "packed",
    "a.zip": "packed",
    "A.ZIP": "packed",
    "a.7z": "packed",
    "a.csv.gz": "packed",
    "a.tsv": "as .csv, with the columns path and label",
    "a.txt": "as .csv",
    "a.jsonl": "as .csv",
    "a.jpg": "no source: give a folder of images",
    "a.h5": "no source",
    "a": "no source",
}


@pytest.mark.parametrize("name", NO_SOURCES)
def test_a_file_that_is_no_source_says_what_to_give(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    line = refusal(open_source, tmp_path / name)
    assert name in line and NO_SOURCES[name] in line


@pytest.mark.parametrize(
    "name", ["a.tar.gz", "a.zip", "list.csv", "a.parquet", "notes.txt", "noending"]
)
def test_a_folder_without_images_says_what_it_holds(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    line = refusal(open_source, tmp_path)
    assert (
        "no images in" in line and f"it holds 1 files (1 {Path(name).suffix or 'without'}" in line
    )


def test_a_folder_that_holds_tars_stands_for_them(tmp_path):
    write_tar(tmp_path / "set" / "b.tar", tar_samples("01"))
    write_tar(tmp_path / "set" / "a.TAR", tar_samples("22"))
    (tmp_path / "set" / "README.md").write_text("words")
    assert labels_by_class(sharded(tmp_path / "set", tmp_path / "out")) == {"0": 1, "1": 1, "2": 2}


def test_a_folder_of_images_may_hold_a_tar_of_them(tmp_path, capsys):
    write_images(tmp_path / "set", ["cat/1.jpg", "dog/2.jpg"])
    write_tar(tmp_path / "set" / "all.tar", tar_samples("01"))
    assert len(open_source(tmp_path / "set").images) == 2
    assert "skipped 1 files that are not images (1 .tar)" in capsys.readouterr().err


def test_data_path_of_tars_without_a_manifest_names_the_program_that_makes_it(tmp_path):
    write_tar(tmp_path / "a.tar", tar_samples("01"))
    line = refusal(open_split, tmp_path, "train")
    assert f"data_tools/index.py {tmp_path}" in line


def test_a_pattern_in_braces_names_its_tars(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"train-{i:03d}.tar", tar_samples([i]))
    assert len(open_source(str(tmp_path / "train-{000..002}.tar")).images) == 3
    assert len(open_source(str(tmp_path / "train-{000,002}.tar")).images) == 2
    assert len(open_source(str(tmp_path / "train-{00?,*}.tar")).images) == 3
    line = refusal(open_source, str(tmp_path / "train-{000..146}.tar"))
    assert "no file" in line and "train-003.tar (144 of 147 are missing)" in line
    assert "no file" in refusal(open_source, str(tmp_path / "train-{000..146.tar"))


def test_a_path_may_hold_the_signs_of_a_pattern(tmp_path):
    for name in ("set[1]", "set{a,b}", "set*"):
        write_tar(tmp_path / name / "x.tar", tar_samples("01"))
        assert len(open_source(tmp_path / name / "x.tar").images) == 2
        assert len(open_source(tmp_path / name).images) == 2


def test_files_of_several_kinds_are_not_one_source(tmp_path):
    write_tar(tmp_path / "a.tar", tar_samples("01"))
    (tmp_path / "a.csv").write_text("path\n")
    assert "several kinds: .csv, .tar" in refusal(open_source, str(tmp_path / "a.*"))


def test_hidden_files_and_extensions_in_capitals(tmp_path):
    write_images(tmp_path, ["a/1.JPG", "a/2.JpEg", "a/._1.JPG", "a/.3.jpg", ".DS_Store.jpg"])
    assert [image.name for image in list_folder(tmp_path).images] == ["a/1.JPG", "a/2.JpEg"]
