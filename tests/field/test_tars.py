"""Tars as people have them: each kind, and what comes of it, by shard.py and by index.py."""

import gzip
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from field_sets import (
    indexed,
    labels_by_class,
    quarantine,
    refusal,
    run_tool,
    run_tool_here,
    samples,
    sharded,
    write_tar,
)
from images import jpeg

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.build import build_training_loader
from scale_smog.data.loaders.stream import read_tar
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.sources import SourceOptions
from scale_smog.data.prepare.verify import verify_folder

NUM = 10  # usual samples

Read = Callable[[Path, Path], TarDataset]


def by_sharding(tars: Path, out: Path) -> TarDataset:
    return sharded(tars, out)


def by_indexing(tars: Path, out: Path) -> TarDataset:
    tars.rename(out)
    return indexed(out)


@pytest.fixture(params=[by_sharding, by_indexing])
def read(request) -> Read:
    """Both ways to a dataset; what they make is checked as verify.py does."""
    return request.param


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return tmp_path / "tars"


PNG_MASK = b"not looked at"
# Members that are no images: beside each of the usual samples, or once.
EXTRA = {
    "arrays beside images": {f"{i:04d}.npy": b"1234" for i in range(NUM)},
    "masks beside images": {f"{i:04d}.mask.png": PNG_MASK for i in range(NUM)},
    "two more views": {f"{i:04d}.{v}.jpg": b"x" for i in range(NUM) for v in ("left", "right")},
    "resource forks of macOS": {f"._{i:04d}.jpg": b"x" for i in range(NUM)},
    "a folder of macOS": {f"__MACOSX/._{i:04d}.jpg": b"x" for i in range(NUM)},
    "pickles": {f"{i:04d}.pyd": b"x" for i in range(NUM)},
    "features": {f"{i:04d}.features.pth": b"x" for i in range(NUM)},
    "captions": {f"{i:04d}.txt": b"a cat" for i in range(NUM)},
    "descriptions": {f"{i:04d}.json": b"{}" for i in range(NUM)},
    "notes for all": {"README.md": b"words", "meta/labels.csv": b"a,b", "LICENSE": b"free"},
    "an image without a name": {".jpg": jpeg(9, 9, 0), "folder/.png": jpeg(9, 9, 0)},
    "a hidden file": {".DS_Store": b"x", "._.DS_Store": b"x"},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_members_that_are_no_images_are_listed_and_do_not_count(tars, tmp_path, read, kind):
    write_tar(tars / "a.tar", {**samples(), **EXTRA[kind]})
    assert read(tars, tmp_path / "out").num_samples == NUM
    listed = {name for name in EXTRA[kind] if not name.endswith((".txt", ".json"))}
    assert set(quarantine(tmp_path / "out")) == {f"a.tar#{name}" for name in listed}


def test_members_that_are_no_images_are_said_in_one_line(tars, tmp_path, read, capsys):
    write_tar(tars / "a.tar", {**samples(), **EXTRA["arrays beside images"]})
    read(tars, tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if ".npy" in line]
    assert len(said) == 1 and "10 members that are no images" in said[0]


# One sample that is of no use among forty: its members, and the member that is named.
BAD = {
    "an empty image": ({"x.jpg": b"", "x.cls": b"0"}, "x.jpg"),
    "an image cut short": ({"x.jpg": jpeg(60, 60, 0)[:-200], "x.cls": b"0"}, "x.jpg"),
    "a label without an image": ({"x.cls": b"0"}, "x.cls"),
    "a label without an image that is readable here": ({"x.heic": b"x", "x.cls": b"0"}, "x.cls"),
    "two images of a key": ({"x.jpg": jpeg(9, 9, 0), "x.png": jpeg(9, 9, 0)}, "x.jpg"),
    "a name with dots": ({"x.y.jpg": jpeg(9, 9, 0), "x.y.cls": b"0"}, "x.y.jpg"),
    "a path that leaves the tar": ({"../x.jpg": jpeg(9, 9, 0)}, "../x.jpg"),
    "an absolute path": ({"/data/x.jpg": jpeg(9, 9, 0), "/data/x.cls": b"0"}, "/data/x.jpg"),
    "a label that is a word": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"cat"}, "x.jpg"),
    "a label that is empty": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b""}, "x.jpg"),
    "a label of half": ({"x.cls": b"0.5", "x.jpg": jpeg(9, 9, 0)}, "x.jpg"),
    "a label with an underscore": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"1_0"}, "x.jpg"),
    "a label of nan": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"nan"}, "x.jpg"),
    "a label of 20 digits": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"9" * 20}, "x.jpg"),
    "a label of 100,000 digits": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"9" * 100_000}, "x.jpg"),
    "a label of fifty million": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"50000000"}, "x.jpg"),
    "a label of 2**31": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"2147483648"}, "x.jpg"),
    "a label that is a pickle": ({"x.jpg": jpeg(9, 9, 0), "x.cls": b"\x80\x04K\x00."}, "x.jpg"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_sample_that_is_of_no_use_is_one_bad_image(tars, tmp_path, read, kind):
    members, named = BAD[kind]
    write_tar(tars / "a.tar", {**samples("0" * 40), **members})
    dataset = read(tars, tmp_path / "out")  # one of 41 is less than --max-bad
    assert (dataset.num_samples, dataset.classes) == (40, ("0",))
    named_ones = [file for file in quarantine(tmp_path / "out") if file.endswith(named)]
    assert len(named_ones) == 1 and named_ones[0].startswith("a.tar#")


# Labels that are read, and what of.
LABELS = {"a blank line": (b" 1 \n", 1), "a plus": (b"+1", 1), "a float": (b"1.0", 1)}
LABELS |= {"zeros before": (b"001", 1), "-1": (b"-1", -1), "-100": (b"-100", -1)}
LABELS |= {"-1.0": (b"-1.0", -1), "-20 digits": (b"-" + b"9" * 20, -1)}


@pytest.mark.parametrize("kind", LABELS)
def test_a_label(tars, tmp_path, read, kind):
    content, label = LABELS[kind]
    write_tar(tars / "a.tar", {**samples("01"), "x.jpg": jpeg(9, 9, 0), "x.cls": content})
    dataset = read(tars, tmp_path / "out")
    assert dataset.classes == ("0", "1")
    assert sorted(dataset.labels.tolist()) == sorted([0, 1, label])


def test_images_without_labels_are_said(tars, tmp_path, read, capsys):
    members = {f"n01440764_{i}.JPEG": jpeg(9, 9, i) for i in range(NUM)}
    write_tar(tars / "n01440764.tar", members)
    assert labels_by_class(read(tars, tmp_path / "out")) == {None: NUM}
    assert "10 of 10 images have no label" in capsys.readouterr().err


def test_some_images_without_labels_are_said(tars, tmp_path, read, capsys):
    write_tar(tars / "a.tar", {**samples("01"), "x.jpg": jpeg(9, 9, 0)})
    assert labels_by_class(read(tars, tmp_path / "out")) == {"0": 1, "1": 1, None: 1}
    assert "1 of 3 images have no label" in capsys.readouterr().err


# Names of keys that are all of a kind.
KEYS = {
    "blanks": "my photo {:04d}",
    "several blanks, and at the end": " my  photo {:04d} ",
    "tabs and new lines": "my\tphoto\n{:04d}",
    "folders": "a/b c/{:04d}",
    "a folder with dots": "v1.0/set.2/{:04d}",
    "a dot and a slash": "./{:04d}",
    "umlauts": "größe {:04d}",
    "no words of any language": "猫 {:04d}",
    "names of 90 signs": "x" * 90 + "{:04d}",
    "quotes": "'\"{:04d}",
    "a percent sign": "%20{:04d}",
    "bytes that are no UTF-8": "caf\udce9{:04d}",
}
KEY_FORMATS = {"bytes that are no UTF-8": tarfile.GNU_FORMAT}


def write_keys(path: Path, kind: str, labels: Iterable[object] = "0101010101") -> None:
    tar_format = KEY_FORMATS.get(kind, tarfile.PAX_FORMAT)
    write_tar(path, samples(labels, name=KEYS[kind]), tar_format)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_any_name_is_read(tars, tmp_path, read, kind):
    write_keys(tars / "a.tar", kind)
    assert labels_by_class(read(tars, tmp_path / "out")) == {"0": 5, "1": 5}


def test_keys_of_any_name_are_read_by_dalis_own_reader_too(tars):
    for number, kind in enumerate(KEYS):
        write_keys(tars / f"{number:02d}.tar", kind, [number] * NUM)
    dataset = indexed(tars)
    expected = [number for number in range(len(KEYS)) for _ in range(NUM)]
    assert sorted(labels_of_fast_loader(dataset, tars)) == expected == dataset.labels.tolist()


def labels_of_fast_loader(dataset: TarDataset, path: Path) -> list[int]:
    """The labels of one pass of DALI's own reader."""
    pytest.importorskip("nvidia.dali")
    num = dataset.num_samples
    data = DataConfig(path=str(path), loader="fast", global_batch=num, workers=1, large_px=16)
    views = training_views(data, AugmentConfig())
    plan, device = EpochPlan(num, num), torch.device("cpu")
    (batch,) = build_training_loader(data, views, dataset, plan, range(1), device)
    return batch.label.tolist()


def test_keys_with_dots_everywhere_are_explained(tars, tmp_path):
    write_tar(tars / "a.tar", samples(name="{:d}.05"))
    for call, argument in ((sharded, tars), (indexed, tars)):
        out = [tmp_path / "out"] if call is sharded else []
        line = refusal(call, argument, *out)
        assert "0.05.jpg" in line and "a key ends at its first dot" in line and "rename" in line


def test_absolute_names_everywhere_are_explained(tars, tmp_path):
    write_tar(tars / "a.tar", samples(name="/data/{:04d}"))
    line = refusal(sharded, tars, tmp_path / "out")
    assert "/data/0000.jpg: its path leaves the tar" in line
    assert "10 of 10 images are bad" in refusal(indexed, tars)


def test_tars_joined_by_cat_are_read_to_the_end(tars, tmp_path, read):
    parts = [samples("01", name="a{:d}"), samples("23", name="b{:d}"), samples("4", name="c{:d}")]
    paths = [write_tar(tmp_path / f"{i}.tar", part) for i, part in enumerate(parts)]
    tars.mkdir()
    (tars / "all.tar").write_bytes(b"".join(path.read_bytes() for path in paths))
    dataset = read(tars, tmp_path / "out")
    assert labels_by_class(dataset) == {str(i): 1 for i in range(5)}
    stored = {dataset.read(i) for i in range(5)}
    assert stored == {content for part in parts for n, content in part.items() if ".jpg" in n}


def test_a_tar_joined_to_an_empty_one_is_read(tars, tmp_path, read):
    empty, full = write_tar(tmp_path / "e.tar", {}), write_tar(tmp_path / "f.tar", samples("01"))
    tars.mkdir()
    (tars / "all.tar").write_bytes(empty.read_bytes() + full.read_bytes() + empty.read_bytes())
    assert read(tars, tmp_path / "out").num_samples == 2


def test_the_same_key_in_two_joined_tars_is_a_duplicate(tars, tmp_path, read):
    one = write_tar(tmp_path / "1.tar", samples("0" * 40))
    two = write_tar(tmp_path / "2.tar", {"0000.jpg": jpeg(9, 9, 9)})
    tars.mkdir()
    (tars / "all.tar").write_bytes(one.read_bytes() + two.read_bytes())
    assert read(tars, tmp_path / "out").num_samples == 39
    assert "duplicate" in quarantine(tmp_path / "out")["all.tar#0000.jpg"]


def test_what_follows_a_tars_end_and_is_no_tar_is_listed(tars, tmp_path, read):
    path = write_tar(tars / "a.tar", samples("0" * 40))
    path.write_bytes(path.read_bytes() + b"junk" * 1000)
    assert read(tars, tmp_path / "out").num_samples == 40
    assert "no header at byte" in quarantine(tmp_path / "out")["a.tar#a.tar"]


def test_a_stream_says_that_it_reads_no_joined_tar(tmp_path, capsys):
    one, two = (
        write_tar(tmp_path / "1.tar", samples("01")),
        write_tar(tmp_path / "2.tar", samples()),
    )
    found = list(read_tar(f"pipe:cat {one} {two}"))
    assert len(found) == 2
    assert "what follows the end of its tar is not read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in BAD if "label" in kind or "two images" in kind])
def test_a_stream_leaves_out_what_the_other_readers_do(tmp_path, kind, capsys):
    path = write_tar(tmp_path / "a.tar", {**samples("01"), **BAD[kind][0]})
    found = list(read_tar(f"pipe:cat {path}"))
    assert [sample.label for sample in found] == [0, 1]
    assert "left out" in capsys.readouterr().err or "without an image" in kind


@pytest.mark.parametrize("kind", LABELS)
def test_a_stream_reads_labels_as_the_other_readers_do(tmp_path, kind):
    content, label = LABELS[kind]
    path = write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(9, 9, 0), "x.cls": content})
    (sample,) = read_tar(f"pipe:cat {path}")
    assert sample.label == label


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_packed_tar_of_the_wrong_name_is_named(tars, tmp_path, packed):
    tars.mkdir()
    with tarfile.open(tars / "a.tar", f"w:{packed}") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    for line in (refusal(sharded, tars, tmp_path / "out"), refusal(indexed, tars)):
        assert "a.tar as an uncompressed tar" in line and "it is compressed by" in line


def test_an_empty_file_is_no_tar(tars, tmp_path):
    write_tar(tars / "a.tar", samples())
    (tars / "b.tar").write_bytes(b"")
    for line in (refusal(sharded, tars, tmp_path / "out"), refusal(indexed, tars)):
        assert "cannot read" in line and "b.tar" in line


def test_a_tar_without_a_good_image_is_left_out_of_a_set(tars, tmp_path, read):
    write_tar(tars / "a.tar", samples("0" * 40))
    write_tar(tars / "b.tar", {})
    write_tar(tars / "c.tar", {"x.jpg": b"", "x.cls": b"0"})
    assert read(tars, tmp_path / "out").num_samples == 40


def test_a_label_that_cannot_be_read_is_not_no_label(tars, tmp_path, read):
    path = write_tar(tars / "a.tar", samples("0" * 40))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
        info = tarfile.TarInfo("x.cls")
        info.type, info.linkname = tarfile.SYMTYPE, "0000.cls"
        tar.addfile(info)
    assert read(tars, tmp_path / "out").num_samples == 40
    assert "its label cannot be read" in quarantine(tmp_path / "out")["a.tar#x.jpg"]


def test_gnu_and_pax_headers_of_any_kind_are_read(tars, tmp_path, read):
    long = "x" * 150
    for i, tar_format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        write_tar(tars / f"{i}.tar", samples("01", name=f"{long}ü{{:d}}"), tar_format)
    with tarfile.open(tars / "2.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.pax_headers = {"comment": "größe", "mtime": "1.5"}
        info = tarfile.TarInfo("y.jpg")
        info.pax_headers = {"SCHILY.xattr.user.ü": "ä"}
        info.size = len(content := jpeg(9, 9, 0))
        tar.addfile(info, __import__("io").BytesIO(content))
    assert read(tars, tmp_path / "out").num_samples == 5


# Tars of several splits in one folder: names, and the pattern that the refusal proposes.
MIXED = {
    "imagenet": ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", "imagenet1k-train"),
    "of a count": ("cc_train-0-of-2.tar", "cc_test-1-of-2.tar", "cc_train"),
    "splits alone": ("training.tar", "validation.tar", "training"),
    "ours and others": ("train-000000.tar", "a-val-0.tar", "train"),
    "our kind of names, of another split": ("training-0.tar", "val-0.tar", "training"),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("call", [sharded, indexed])
def test_tars_of_several_splits_never_become_one_and_a_pattern_tells_them_apart(
    tars, tmp_path, call, kind
):
    first, second, beginning = MIXED[kind]
    write_tar(tars / first, samples("0101"))
    write_tar(tars / second, samples("00"))
    out = [tmp_path / "out"] if call is sharded else []
    line = refusal(call, tars, *out)
    pattern = f"{tars}/{beginning}*.tar"
    assert f"{tars} holds tars of the splits " in line and f"as '{pattern}' --split train" in line
    if call is sharded:
        assert sharded(pattern, tmp_path / "out").num_samples == 4
    else:
        index_folder(pattern)
        index_folder(tars, split="val")  # what no split has yet
        assert TarDataset(tars, "train").num_samples == 4
        assert TarDataset(tars, "val").num_samples == 2 and verify_folder(tars) == []


def test_of_our_own_tars_without_a_manifest_each_split_takes_its_own(tars, tmp_path, capsys):
    write_tar(tars / "train-000000.tar", samples("0101"))
    write_tar(tars / "val-000000.tar", samples("00"))
    assert sharded(tars, tmp_path / "out").num_samples == 4
    said = capsys.readouterr().err
    assert f"{tars}: not of the split train, and left out: val-000000.tar\n" in said
    about = SourceOptions(split="val")
    val = sharded(tars, tmp_path / "out-val", split="val", source_options=about)
    assert labels_by_class(val) == {"0": 2}
    for split, num_samples in (("train", 4), ("val", 2)):
        assert index_folder(tars, split).num_samples == num_samples
    assert verify_folder(tars) == []


@pytest.mark.parametrize(
    "names",
    [
        ("train-000000.tar", "train-000001.tar"),
        ("val-0.tar", "validation-1.tar"),
        ("n01440764.tar", "n01443537.tar"),
        ("train.tar", "truck.tar"),  # a lone word may be a class
    ],
)
def test_tars_whose_names_tell_of_one_split_at_most_are_all_taken(tars, tmp_path, read, names):
    for name in names:
        write_tar(tars / name, samples("01"))
    assert read(tars, tmp_path / "out").num_samples == 4


def test_a_pattern_without_a_tar_is_named(tars):
    write_tar(tars / "a.tar", samples())
    assert f"no tars {tars}/b*.tar" in refusal(index_folder, tars / "b*.tar")


def test_the_programs_end_with_one_line(tmp_path):
    """A sample of the kinds above, as a user meets them."""
    write_tar(tmp_path / "a" / "a.tar", samples(["9" * 20] * 3))
    write_tar(tmp_path / "b" / "b.tar", samples(name="{:d}.05"))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"x"))
    calls = [("shard", tmp_path / "a", tmp_path / "1"), ("index", tmp_path / "a")]
    calls += [("shard", tmp_path / "b", tmp_path / "2"), ("index", tmp_path / "b")]
    calls += [("shard", tmp_path / "c.tar.gz", tmp_path / "3")]
    ended = [run_tool(*calls[0]), *(run_tool_here(*call) for call in calls[1:])]
    for status, said in ended:
        assert status == 2, said
        assert "Traceback" not in said and said.splitlines()[-1].startswith("error: ")
