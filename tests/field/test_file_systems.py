"""File systems as people have them: each kind, and what comes of it."""

import os
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
from field_sets import (
    indexed,
    quarantine,
    refusal,
    run_tool,
    samples,
    sharded,
    write_images,
    write_tar,
)

from scale_smog.data.prepare.sources import open_source
from scale_smog.data.prepare.verify import verify_folder

needs_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", [f"{i}.jpg" for i in range(4)])


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as each:
        each.bind(str(path))


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_link_to_device])
def test_what_is_no_plain_file_is_refused_by_name_and_never_opened(images, make, monkeypatch):
    monkeypatch.chdir(images)  # the path of a socket is short
    make(Path("x.jpg"))
    assert "x.jpg is no plain file" in refusal(open_source, images)


def test_a_link_to_nowhere_is_named(images):
    (images / "x.jpg").symlink_to("nowhere.jpg")
    assert "x.jpg: No such file" in refusal(open_source, images)


def test_hard_and_soft_links_are_images_of_their_own(images, tmp_path):
    os.link(images / "0.jpg", images / "hard.jpg")
    (images / "soft.jpg").symlink_to("0.jpg")
    assert sharded(images, tmp_path / "out").num_samples == 6


def test_a_folder_by_the_name_of_an_image_is_a_folder(tmp_path):
    write_images(tmp_path / "set", ["cat.jpg/1.jpg", "dog.jpg/2.jpg"])
    assert open_source(tmp_path / "set").classes == ("cat.jpg", "dog.jpg")


def test_a_hole_in_place_of_an_image_is_put_aside(images, tmp_path):
    with open(images / "x.jpg", "wb") as file:
        file.truncate(2**20)
    assert sharded(images, tmp_path / "out", max_bad=0.5).num_samples == 4
    assert list(quarantine(tmp_path / "out")) == ["x.jpg"]


def test_a_hole_in_a_tar_is_no_plain_member(tmp_path):
    (tmp_path / "set").mkdir()
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(2**20)
        file.write(b"end")
    path = write_tar(tmp_path / "set" / "a.tar", samples("0" * 40), tarfile.GNU_FORMAT)
    done = subprocess.run(["tar", "--sparse", "-C", str(tmp_path), "-rf", str(path), "x.jpg"])
    if done.returncode:
        pytest.skip("tar is not GNU's")
    assert indexed(tmp_path / "set").num_samples == 40
    assert "sparse" in quarantine(tmp_path / "set")["a.tar#x.jpg"]


def test_an_out_that_is_a_file_is_named(images, tmp_path):
    (tmp_path / "out").write_text("")
    assert f"{tmp_path}/out" in refusal(sharded, images, tmp_path / "out")


def test_an_out_that_no_folder_can_be_made_in_is_named(images):
    assert "/proc/out" in refusal(sharded, images, Path("/proc/out"))


@needs_user
def test_an_out_that_may_not_be_written_is_named(images, tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", samples())
    for folder in (tmp_path / "tars", tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o500)
    assert "cannot" in refusal(sharded, images, tmp_path / "out")
    assert "cannot write" in refusal(indexed, tmp_path / "tars")


@needs_user
def test_an_image_that_may_not_be_read_is_named_and_not_put_aside(images, tmp_path):
    (images / "3.jpg").chmod(0)
    assert "3.jpg: Permission denied" in refusal(sharded, images, tmp_path / "out")


@pytest.mark.parametrize("name", ["train-quarantine.jsonl", "manifest.json", "a.idx", "a.npy"])
def test_a_file_of_the_dataset_that_cannot_be_written_is_one_line(images, tmp_path, name):
    """A folder of that name stands for a disk that refuses, to root as well."""
    if name.startswith("a."):
        write_tar(tmp_path / "tars" / "a.tar", samples())
        (tmp_path / "tars" / name / "x").mkdir(parents=True)
        assert f"cannot write {tmp_path}" in refusal(indexed, tmp_path / "tars")
        return
    (tmp_path / "out" / name / "x").mkdir(parents=True)
    if name == "manifest.json":
        assert "manifest.json" in refusal(sharded, images, tmp_path / "out")
    else:
        assert f"cannot write {tmp_path}" in refusal(sharded, images, tmp_path / "out")


def test_a_strict_umask_leaves_files_that_their_owner_reads(images, tmp_path):
    before = os.umask(0o077)
    try:
        assert sharded(images, tmp_path / "out").num_samples == 4
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "out").iterdir())


def test_a_dataset_may_move_and_be_linked_to(images, tmp_path):
    sharded(images, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved to größe")
    (tmp_path / "link").symlink_to(tmp_path / "moved to größe")
    assert verify_folder(tmp_path / "link") == []


def test_a_shard_that_is_a_folder_is_a_problem_not_a_traceback(images, tmp_path):
    sharded(images, tmp_path / "out")
    (tmp_path / "out" / "train-000000.tar").unlink()
    (tmp_path / "out" / "train-000000.tar").mkdir()
    assert any("train-000000.tar" in problem for problem in verify_folder(tmp_path / "out"))


def test_a_tar_whose_name_is_no_utf_8_is_refused_by_its_index_and_read_by_the_sharder(tmp_path):
    name = os.fsdecode(b"caf\xe9.tar")
    write_tar(tmp_path / "set" / name, samples())
    assert "caf\\xe9.tar: its name is not UTF-8" in refusal(indexed, tmp_path / "set")
    assert sharded(tmp_path / "set", tmp_path / "out").num_samples == 10


def test_the_program_runs_where_home_and_the_temporary_folder_are_not(images, tmp_path):
    places = {"HOME": "/nowhere", "TMPDIR": "/nowhere", "XDG_CACHE_HOME": "/nowhere"}
    status, said = run_tool("shard", images, tmp_path / "out", "--workers=1", **places)
    assert status == 0, said
