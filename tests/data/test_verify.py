"""Promises of the verification: nothing that differs from the manifest stays unnamed."""

import json
import runpy
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_smog.data.images import ImageEntry
from scale_smog.data.prepare import verify
from scale_smog.data.prepare.shard import shard_source
from scale_smog.data.prepare.sources import Source
from scale_smog.data.prepare.verify import verify_folder
from scale_smog.data.tar_dataset import SIDECAR_DTYPE
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256

PROGRAM = Path(__file__).parents[2] / "data_tools" / "verify.py"


def _read(name: str) -> bytes:
    encoded = BytesIO()
    Image.new("RGB", (8, 6), (int(name), 0, 0)).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(verify, "num_usable_cores", lambda: 1)
    images = tuple(ImageEntry(str(i), i % 2, len(_read(str(i)))) for i in range(6))
    source = Source(("a", "b"), images, _read)
    shard_source(source, tmp_path / "data", shard_samples=3, workers=1)
    return tmp_path / "data"


def _flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _bless(folder: Path) -> None:
    """Gives the manifest the hashes of the files as they are now, to look behind the hashes."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["splits"]["train"]["shards"]:
        tar = folder / entry["name"]
        entry["sha256"] = file_sha256(tar)
        entry["idx_sha256"] = file_sha256(tar.with_suffix(".idx"))
        entry["npy_sha256"] = file_sha256(tar.with_suffix(".npy"))
    path.write_text(json.dumps(manifest))


def _edit_sidecar(folder: Path, field: str, value: int) -> None:
    path = folder / "train-000001.npy"
    rows = np.load(path)
    rows[field][1] = value
    np.save(path, rows)
    _bless(folder)


def test_a_sound_folder_has_no_problems(folder):
    assert verify_folder(folder) == []


@pytest.mark.parametrize("extension", ["tar", "idx", "npy"])
def test_every_missing_file_is_named(folder, extension):
    (folder / f"train-000001.{extension}").unlink()
    assert verify_folder(folder) == [f"train-000001.{extension}: missing"]


@pytest.mark.parametrize("extension", ["tar", "idx", "npy"])
def test_every_changed_file_is_named(folder, extension):
    _flip_byte(folder / f"train-000001.{extension}", -1)
    problems = verify_folder(folder)
    assert problems[0] == (f"train-000001.{extension}: not the file the manifest describes")


def test_a_truncated_tar_is_named(folder):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:1000])
    problems = verify_folder(folder)
    assert len(problems) > 1
    assert all(
        problem.startswith(("train-000001.tar: ", "train-000001.idx: ")) for problem in problems
    )


def test_an_extra_shard_is_named(folder):
    shutil.copy(folder / "train-000001.tar", folder / "train-000002.tar")
    assert verify_folder(folder) == ["train-000002.tar: not in the manifest"]


def test_a_changed_image_is_named_by_its_key(folder):
    offset = int(np.load(folder / "train-000001.npy")["offset"][1])
    _flip_byte(folder / "train-000001.tar", offset + 40)
    _bless(folder)
    problems = verify_folder(folder)
    assert "train-000001.tar: 000000000004: its bytes changed (crc32)" in problems
    assert any("000000000004: does not decode" in problem for problem in problems)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("key", 77, "the tar has 000000000004.png 000000000004.cls in its place"),
        ("offset", 512, "the sidecar has another offset or size"),
        ("size", 3, "the sidecar has another offset or size"),
        ("width", 9, "the sidecar has another width or height"),
        ("height", 9, "the sidecar has another width or height"),
        ("label", 7, "label 7 has no class"),
        ("label", -1, "the sidecar -1"),
        ("crc32", 7, "its bytes changed (crc32)"),
    ],
)
def test_every_sidecar_field_is_checked_against_the_tar(folder, field, value, problem):
    assert field in SIDECAR_DTYPE.names
    _edit_sidecar(folder, field, value)
    problems = verify_folder(folder)
    assert any(line.endswith(problem) for line in problems)
    assert all(line.startswith("train-000001.tar: ") for line in problems)


def test_a_stale_index_is_named(folder):
    shutil.copy(folder / "train-000000.idx", folder / "train-000001.idx")
    _bless(folder)
    assert verify_folder(folder) == ["train-000001.idx: does not index train-000001.tar"]


def test_a_sample_count_that_does_not_add_up_is_named(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_samples": 6', '"num_samples": 7'))
    assert verify_folder(folder) == ["split train: 7 samples, shards 6"]


def test_a_folder_without_manifest_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="unfinished or foreign"):
        verify_folder(tmp_path)


def test_the_program_exits_with_0_1_or_2(folder, tmp_path, monkeypatch, capsys):
    def exit_status(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["verify.py", str(path)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        return exit_info.value.code

    assert exit_status(folder) == 0
    (folder / "train-000001.idx").unlink()
    assert exit_status(folder) == 1
    assert "train-000001.idx: missing\n" in capsys.readouterr().out
    assert exit_status(tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: no dataset folder ")
