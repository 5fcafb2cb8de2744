"""CSV lists as people write them: each kind, and what comes of it."""

from pathlib import Path

import pytest
from field_sets import labels_by_class, refusal, run_tool, sharded, write_images

from scale_smog.data.prepare.sources import open_source

NUM = 6


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder beside the list: im/0.jpg to im/5.jpg, and names that need care."""
    names = [f"im/{i}.jpg" for i in range(NUM)]
    write_images(tmp_path, [*names, "im/a,b.jpg", "im/ leading.jpg", "im/größe.jpg"])
    return tmp_path


def a_list(folder: Path, labels: list[str], header: str = "path,label") -> Path:
    lines = [header, *(f"im/{i}.jpg,{label}" for i, label in enumerate(labels))]
    return raw_list(folder, "\n".join(lines).encode())


def raw_list(folder: Path, content: bytes) -> Path:
    (folder / "list.csv").write_bytes(content)
    return folder / "list.csv"


# What the labels are: (labels of the lines, classes in order, label of each line)
LABELS = {
    "names": (["cat", "dog", "cat"], ["cat", "dog"], [0, 1, 0]),
    "blanks around a name": (["cat", " cat", "cat ", "\tcat"], ["cat"], [0, 0, 0, 0]),
    "a blank that is no space": (["cat", "cat\u00a0"], ["cat"], [0, 0]),
    "one name in two Unicode forms": (["caf\u00e9", "cafe\u0301"], ["caf\u00e9"], [0, 0]),
    "in quotes": (['"cat"', ' "cat"'], ["cat"], [0, 0]),
    "whole numbers": (["10", "9", "2"], ["2", "9", "10"], [2, 1, 0]),
    "numbers with a fraction": (["1.0", "10.0", "2.0"], ["1.0", "2.0", "10.0"], [0, 2, 1]),
    "numbers with and without zeros before": (["1", "01", "10"], ["01", "1", "10"], [1, 0, 2]),
    "a number written in two ways": (["3", "3.0", "03"], ["03", "3", "3.0"], [1, 2, 0]),
    "numbers beyond a float": (
        ["9007199254740993", "9007199254740992"],
        ["9007199254740992", "9007199254740993"],
        [1, 0],
    ),
    "numbers among names": (["10", "9", "cat"], ["10", "9", "cat"], [0, 1, 2]),
    "none": (["cat", "", " "], ["cat"], [0, -1, -1]),
    "-1 for none": (["0", "-1", "1", "-1"], ["0", "1"], [0, -1, 1, -1]),
    "-1.0 for none, as pandas writes it": (["0.0", "-1.0"], ["0.0"], [0, -1]),
    "-1 for none among names": (["cat", "-1"], ["cat"], [0, -1]),
    "-100 for none": (["0", "-100"], ["0"], [0, -1]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(images, kind):
    labels, classes, numbers = LABELS[kind]
    source = open_source(a_list(images, labels))
    assert list(source.classes) == classes
    assert [image.label for image in source.images] == numbers


HEADERS = ["path, label", " path ,label ", "Path,Label", 'path, "label"', "\ufeffpath,label"]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_with_blanks_capitals_or_a_mark_still_names_its_columns(images, header):
    source = open_source(a_list(images, [" a", " b"], header))
    assert source.classes == ("a", "b")


def test_labels_under_another_name_are_missed_with_a_word(images, capsys):
    source = open_source(a_list(images, ["a", "b"], "path,class"))
    assert source.classes == ()
    assert "list.csv: no column 'label' among path, class: no labels" in capsys.readouterr().err


def test_images_without_a_label_are_counted(images, tmp_path, capsys):
    dataset = sharded(a_list(images, ["a", "", "-1"]), tmp_path / "out")
    assert labels_by_class(dataset) == {"a": 1, None: 2}
    assert "list.csv: 2 of 3 images have no label" in capsys.readouterr().err


# What is read, however it is written.
READ = {
    "UTF-8": "path,label\nim/größe.jpg,größe\n".encode(),
    "UTF-8 with a mark": "path,label\nim/größe.jpg,größe\n".encode("utf-8-sig"),
    "UTF-16 of Excel": "path,label\nim/größe.jpg,größe\n".encode("utf-16"),
    "UTF-16, high bytes first": b"\xfe\xff" + "path,label\nim/größe.jpg,größe".encode("utf-16-be"),
    "lines of Windows": "path,label\r\nim/größe.jpg,größe\r\n".encode(),
    "lines of old Macs": "path,label\rim/größe.jpg,größe\r".encode(),
    "blank lines": "path,label\n\nim/größe.jpg,größe\n , \n\n".encode(),
    "a comma too many": "path,label,\nim/größe.jpg,größe,\n".encode(),
    "a comma too many in the lines": "path,label\nim/größe.jpg,größe,\n".encode(),
    "other columns": "id,label,path\n7,größe,im/größe.jpg\n".encode(),
    "blanks around the path": "path,label\n im/größe.jpg ,größe\n".encode(),
    "a line without its label's comma": "path\nim/größe.jpg\n".encode(),
}


@pytest.mark.parametrize("kind", READ)
def test_read(images, kind):
    (image,) = open_source(raw_list(images, READ[kind])).images
    assert image.name == "größe.jpg"


def test_names_with_commas_and_blanks_are_read_in_quotes(images):
    source = open_source(raw_list(images, b'path,label\n"im/a,b.jpg",x\n"im/ leading.jpg",y\n'))
    assert [image.name for image in source.images] == ["a,b.jpg", " leading.jpg"]


# What is refused: (content, words of the one line)
REFUSED = {
    "Latin-1": ("path,label\nim/0.jpg,café\n".encode("latin-1"), ["not UTF-8", "save it as UTF-8"]),
    "UTF-16 without a mark": ("path,label\n".encode("utf-16-le"), ["not UTF-8", "zero bytes"]),
    "half a UTF-16 file": ("path,label\nim/0.jpg,a".encode("utf-16")[:-1], ["not UTF-8"]),
    "a field of 200 kB": (b"path,label\nim/0.jpg," + b"x" * 200_000, ["after line 1", "quote"]),
    "an open quote": (
        b'path,label\nim/0.jpg,"a\n' + b"im/1.jpg,b\n" * 20_000,
        ["not CSV", "quote"],
    ),
    "a label with a comma": (b"path,label\nim/0.jpg,cat, big\n", ["line 2", "3 fields", "quotes"]),
    "semicolons": (b"path;label\nim/0.jpg;a\n", ["no column 'path'", "path;label"]),
    "tabs": (b"path\tlabel\nim/0.jpg\ta\n", ["no column 'path'"]),
    "no header": (b"im/0.jpg,a\n", ["no column 'path'; it has im/0.jpg, a"]),
    "two columns of labels": (b"path,label,label\nim/0.jpg,a,b\n", ["'label' twice"]),
    "no lines": (b"path,label\n", ["lists no images"]),
    "an empty file": (b"", ["no header"]),
    "a missing file": (b"path\nim/9.jpg\n", ["line 2: no file", "im/9.jpg"]),
    "no path": (b"path,label\n,a\n", ["line 2: no file"]),
    "a folder": (b"path\nim\n", ["line 2: no file"]),
    "backslashes": (b"path\nim\\0.jpg\n", ["no file", "divided by /"]),
    "a name too long": (b"path\n" + b"x" * 5000 + b".jpg\n", ["no file"]),
    "a zero byte": (b"path\nim/0\x00.jpg\n", ["no file"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(images, kind):
    content, words = REFUSED[kind]
    line = refusal(open_source, raw_list(images, content))
    assert "list.csv" in line
    assert not [word for word in words if word not in line], line


def test_a_relative_list_may_name_absolute_files(images, monkeypatch):
    monkeypatch.chdir(images)
    raw_list(images, f"path\nim/0.jpg\n{images}/im/1.jpg\n".encode())
    assert [image.name for image in open_source("list.csv").images] == ["0.jpg", "1.jpg"]


def test_the_same_list_gives_the_same_bytes_whatever_pythons_hashes_are(images, tmp_path):
    source = a_list(images, ["1", "01", "1.0", "x", "10", "y"])
    contents = []
    for seed in ("1", "2", "3"):
        out = tmp_path / seed
        status, said = run_tool("shard", source, out, "--workers=1", PYTHONHASHSEED=seed)
        assert status == 0, said
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]
