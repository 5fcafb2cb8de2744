"""Promises of the sharder: same bytes always, nothing lost silently, one clear line on mistakes."""

import fcntl
import json
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from scale_smog.counter_rng import permutation
from scale_smog.data.images import BadImageError, Preprocessing, decode, preprocess
from scale_smog.data.manifest import load_manifest
from scale_smog.data.prepare import shard as sharding
from scale_smog.data.prepare import work_folder as work_folders
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.shard_plan import cut_into_shards
from scale_smog.data.prepare.sources.folder import folder_source
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.data.workers import run_in_processes
from scale_smog.errors import UserError

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 24


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photo(index: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _translucent() -> Image.Image:
    image = _photo()
    image.putalpha(128)
    return image


def _16_bit_rows(image: Image.Image) -> bytes:
    """PNG scan lines, each behind its filter byte; 257 maps 0..255 onto 0..65535."""
    return b"".join(b"\0" + (257 * row.astype(">u2")).tobytes() for row in np.asarray(image))


def _png_file(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A PNG in RGB of any bit depth, which Pillow itself cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def source(tmp_path) -> Path:
    """Two classes of JPEG, PNG and BMP images."""
    folder = tmp_path / "images"
    for index in range(NUM_IMAGES):
        kind, extension = [("JPEG", "JPG"), ("PNG", "png"), ("BMP", "bmp")][index % 3]
        path = folder / ("cat" if index % 2 else "dog") / f"{index}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(_photo(index), kind))
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _shard(source: Path, out: Path, **options: object) -> dict[str, bytes]:
    shard_folder(source, out, **{"shard_samples": 5, "workers": 1, **options})
    return _files(out)


# ------------------------------------------------------------------------------------- same bytes


def test_output_is_byte_identical_for_any_worker_count_and_place(source, tmp_path):
    moved = tmp_path / "elsewhere" / "copied"
    shutil.copytree(source, moved, copy_function=shutil.copyfile)  # new times, too
    one = _shard(source, tmp_path / "one", workers=1)
    two = _shard(moved, tmp_path / "other" / "two", workers=2)
    assert len(one) == 3 * 5 + 2  # tar, idx and npy of five shards, manifest, quarantine
    assert one == two


def test_shards_are_listed_in_order_whichever_finishes_first(source, tmp_path, monkeypatch):
    expected = _shard(source, tmp_path / "out")

    def backwards(function, jobs, workers, lock, advice):
        return reversed([(index, function(job)) for index, job in enumerate(jobs)])

    monkeypatch.setattr(sharding, "run_in_processes", backwards)
    assert _shard(source, tmp_path / "backwards") == expected


def test_after_a_killed_worker_fewer_of_them_are_advised(source, tmp_path, monkeypatch):
    def killed(_function, _jobs, _workers, lock, *advice):
        return run_in_processes(os._exit, [1, 1], 2, lock, *advice)

    monkeypatch.setattr(sharding, "run_in_processes", killed)
    with pytest.raises(UserError, match="run the same command again with fewer workers, it conti"):
        _shard(source, tmp_path / "out")


SLOW_SHARD_PROGRAM = """
import sys, time
from scale_smog.cli.main import run_command
from scale_smog.data.prepare import shard, writer

def finish_shard(job):
    time.sleep(0.5)
    return writer.finish_shard(job)

if __name__ == "__main__":
    shard.finish_shard = finish_shard
    run_command("shard", sys.argv[1:])
"""


def test_resume_after_kill_9_waits_for_the_workers_and_gives_the_same_bytes(tmp_path, monkeypatch):
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for index in range(120):
        (source / f"{index}.bmp").write_bytes(_encoded(_photo(index, 24, 24), "BMP"))
    program = tmp_path / "slow_shard.py"  # slow enough to be killed in the middle
    program.write_text(SLOW_SHARD_PROGRAM)
    command = [sys.executable, str(program), str(source), str(out)]
    process = subprocess.Popen([*command, "--shard-samples", "2", "--workers", "2"])
    work = out / ".sharding-train"
    while len(list(work.glob("train-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    servers = psutil.Process(process.pid).children()
    workers = [worker for server in servers for worker in server.children()]
    for worker in workers:
        worker.suspend()
    ended = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    while any(worker.status() not in ended for worker in workers):
        time.sleep(0.002)  # a thread may run on until another has taken the signal
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and not (out / "manifest.json").exists()
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match="another process is"):
            patch.setattr(work_folders, "LOCK_PATIENCE_S", 0.1)
            _shard(source, out, shard_samples=2)
    finally:
        for worker in workers:
            worker.resume()  # and they end, as their parent is gone
    finished = [out / f"{path.stem}.tar" for path in work.glob("train-*.json")]
    assert len(finished) < 60
    times = [path.stat().st_mtime_ns for path in finished]

    monkeypatch.setattr(work_folders, "LOCK_PATIENCE_S", 60.0)  # on a busy machine, for the workers
    resumed = _shard(source, out, shard_samples=2)
    assert [path.stat().st_mtime_ns for path in finished] == times  # not written again
    assert resumed == _shard(source, tmp_path / "fresh", shard_samples=2)


def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(source, tmp_path):
    (source / "cat" / "bad.jpg").write_bytes(b"bad")
    fresh = _shard(source, tmp_path / "fresh", max_bad=0.5)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 25 images are bad"):
        _shard(source, out, max_bad=0)
    (out / "train-000001.tar").write_bytes(b"damaged")
    (out / "train-000002.npy").unlink()
    assert _shard(source, out, max_bad=0.5) == fresh


def test_the_order_depends_on_the_seed_alone():
    # Pinned: another numpy must not reorder a dataset that is half written.
    assert permutation(10, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 1).tolist() != permutation(10, 0).tolist()
    assert sorted(permutation(1000, 3)) == list(range(1000))


def test_another_seed_gives_another_order_of_the_same_samples(source, tmp_path):
    _shard(source, tmp_path / "0", seed=0)
    _shard(source, tmp_path / "1", seed=1)
    datasets = [TarDataset(tmp_path / name, "train") for name in "01"]
    first, second = ([d.read(i) for i in range(d.num_samples)] for d in datasets)
    assert first != second
    assert sorted(first) == sorted(second)


def test_no_shard_exceeds_either_limit(source, tmp_path):
    sizes = [300_000] * 7 + [3_000_000, 10, 10]
    cuts = cut_into_shards(sizes, shard_mib=1, shard_samples=4)
    assert [cut.stop - cut.start for cut in cuts] == [3, 3, 1, 1, 2]  # one image may exceed it
    assert [cut.stop - cut.start for cut in cut_into_shards([1] * 9, 1, 4)] == [4, 4, 1]

    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (300, 300, 3), dtype=np.uint8)
        (source / "cat" / f"large{index}.png").write_bytes(_encoded(Image.fromarray(noise), "PNG"))
    shard_folder(source, tmp_path / "out", shard_mib=1, workers=1)
    shards = load_manifest(tmp_path / "out").splits["train"].shards
    assert len(shards) > 1
    assert all(entry.bytes <= 2**20 + tarfile.RECORDSIZE for entry in shards)


# ------------------------------------------------------------------------------------ the contract


def test_tars_are_plain_ustar_without_time_or_owner(source, tmp_path):
    _shard(source, tmp_path / "out")
    keys = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            assert tar.pax_headers == {}
            for member in tar:
                assert member.type == tarfile.REGTYPE
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.uname, member.gname) == ("", "")
                keys.append(member.name)
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        assert path.stat().st_size % tarfile.RECORDSIZE == 0  # as tar itself ends a file
    assert [key[:12] for key in keys[::2]] == [f"{index:012d}" for index in range(NUM_IMAGES)]
    assert {key[12:] for key in keys[::2]} == {".jpg", ".png"}
    assert keys[1::2] == [f"{index:012d}.cls" for index in range(NUM_IMAGES)]


def test_plain_webdataset_reads_the_tars(source, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    _shard(source, tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    dataset = TarDataset(tmp_path / "out", "train")
    assert [sample["cls"] for sample in samples] == dataset.labels.tolist()
    for sample_id, sample in enumerate(samples):
        pixels = sample.get("jpg", sample.get("png"))
        expected = Image.open(BytesIO(dataset.read(sample_id))).convert("RGB")
        assert np.array_equal(pixels, expected)


def test_idx_equals_dali_wds2idx(source, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI's wds2idx is not installed")
    _shard(source, tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert len(paths) == 5
    for path in paths:
        with wds2idx.IndexCreator(str(path), str(tmp_path / "theirs"), verbose=False) as creator:
            creator.create_index()
        assert path.with_suffix(".idx").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_labels_follow_the_sorted_class_folders(source, tmp_path):
    _shard(source, tmp_path / "out")
    dataset = TarDataset(tmp_path / "out", "train")
    assert dataset.classes == ("cat", "dog")
    dogs = {_photo(i).tobytes() for i in range(0, NUM_IMAGES, 2)}
    for sample_id in range(dataset.num_samples):
        image = Image.open(BytesIO(dataset.read(sample_id)))
        if image.format == "PNG":
            assert dataset.labels[sample_id] == (image.tobytes() in dogs)


def test_a_flat_folder_is_unlabelled(source, tmp_path):
    _shard(source / "cat", tmp_path / "out")
    dataset = TarDataset(tmp_path / "out", "train")
    assert (dataset.classes, dataset.num_samples) == ((), NUM_IMAGES // 2)
    assert set(dataset.labels) == {-1}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert tar.extractfile("000000000000.cls").read() == b"-1"


def test_splits_share_a_folder_and_its_classes(source, tmp_path):
    out = tmp_path / "out"
    train = _shard(source, out)
    both = _shard(source, out, split="val")
    assert {name: both[name] for name in train if name != "manifest.json"} == {
        name: content for name, content in train.items() if name != "manifest.json"
    }
    assert set(load_manifest(out).splits) == {"train", "val"}
    (source / "cat").rename(source / "bird")
    with pytest.raises(UserError, match="class 0 'cat', the source 'bird'"):
        _shard(source, out, split="test")


def test_a_split_that_is_finished_meanwhile_keeps_its_classes(source, tmp_path, monkeypatch):
    out, run = tmp_path / "out", sharding._run

    def run_while_another_finishes(*arguments):
        monkeypatch.setattr(sharding, "_run", run)
        shutil.copytree(source, tmp_path / "other")
        (tmp_path / "other" / "cat").rename(tmp_path / "other" / "bird")
        shard_folder(tmp_path / "other", out, split="val", shard_samples=5, workers=1)
        return run(*arguments)

    monkeypatch.setattr(sharding, "_run", run_while_another_finishes)
    with pytest.raises(UserError, match="class 0 'bird', the source 'cat'"):
        _shard(source, out)
    assert load_manifest(out).classes == ("bird", "dog")


# -------------------------------------------------------------------------------------- the images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_pass_byte_for_byte(kind, mode):
    content = _encoded(_photo().convert(mode), kind)
    image = preprocess(content)
    assert image.content == content
    assert image.extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    assert (image.width, image.height) == (40, 30)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(_encoded(_photo().convert("CMYK"), "JPEG", quality=95), id="cmyk"),
        pytest.param(_encoded(_photo().convert("P"), "PNG"), id="palette"),
        pytest.param(_encoded(_translucent(), "PNG"), id="rgba"),
        pytest.param(_encoded(_translucent(), "WEBP", lossless=True), id="webp-alpha"),
        pytest.param(_encoded(_photo(), "GIF"), id="gif"),
        pytest.param(_encoded(_photo(), "BMP"), id="bmp"),
        pytest.param(_encoded(_photo(), "TIFF"), id="tiff"),
        pytest.param(
            _encoded(_photo(), "WEBP", save_all=True, append_images=[_photo(1)], lossless=True),
            id="animated",
        ),
        pytest.param(_png_file(40, 30, 16, _16_bit_rows(_photo())), id="16-bit-rgb"),
    ],
)
def test_all_else_becomes_an_rgb_jpeg_that_looks_the_same(content):
    image = preprocess(content)
    decoded = Image.open(BytesIO(image.content))
    assert (image.extension, decoded.format, decoded.mode) == ("jpg", "JPEG", "RGB")
    assert decoded.size == (image.width, image.height) == (40, 30)
    difference = np.abs(np.asarray(decoded, float) - np.asarray(_photo(), float))
    assert difference.mean() < 12  # a palette costs most


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    image = preprocess(_encoded(Image.fromarray(ramp), "PNG"))
    decoded = np.asarray(Image.open(BytesIO(image.content)), float)
    assert np.abs(decoded[8, :, 0] - np.linspace(0, 255, 64)).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_baked_in(kind):
    image = Image.new("RGB", (40, 80))
    image.paste((255, 255, 255), (0, 0, 40, 40))  # bright top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the bright half is right
    turned = preprocess(_encoded(image, kind, exif=exif))
    decoded = Image.open(BytesIO(turned.content))
    assert (turned.width, turned.height) == decoded.size == (80, 40)
    assert 0x0112 not in decoded.getexif()
    assert decoded.getpixel((70, 20))[0] > 250
    assert decoded.getpixel((10, 20))[0] < 5


def test_resize_shorter_only_shrinks():
    small = _encoded(_photo(0, 40, 30), "PNG")
    assert preprocess(small, Preprocessing(resize_shorter=30)).content == small
    large = preprocess(_encoded(_photo(0, 301, 150), "PNG"), Preprocessing(resize_shorter=30))
    assert (large.extension, large.width, large.height) == ("jpg", 60, 30)


# -------------------------------------------------------------------------------------- bad images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"garbage", "not an image that Pillow can read"),
        (_encoded(_photo(), "JPEG")[:-100], "truncated"),
        (_encoded(_photo(), "PNG")[:-60], "truncated|Truncated"),
        (_png_file(20_000, 9_000, 8, b""), "180000000 pixels"),
    ],
    ids=["empty", "garbage", "truncated-jpeg", "truncated-png", "too-large"],
)
def test_a_bad_image_has_a_reason_without_chance_in_it(content, reason):
    with pytest.raises(BadImageError, match=reason) as error:
        decode(content)
    assert "0x" not in str(error.value)


def test_an_image_that_does_not_decode_is_named_and_put_aside(source, tmp_path, capsys):
    (source / "dog" / "bad.jpg").write_bytes(_encoded(_photo(), "JPEG")[:-100])
    files = _shard(source, tmp_path / "out")
    (line,) = files["train-quarantine.jsonl"].splitlines()
    assert json.loads(line)["file"] == "dog/bad.jpg"
    assert "truncated" in json.loads(line)["reason"]
    assert "put aside: dog/bad.jpg: image file is truncated" in capsys.readouterr().err
    assert TarDataset(tmp_path / "out", "train").num_samples == NUM_IMAGES


def test_too_many_bad_images_leave_no_manifest(source, tmp_path):
    for index in range(3):
        (source / "dog" / f"bad{index}.jpg").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"3 of 27 images are bad.*raise --max-bad"):
        _shard(source, tmp_path / "out", max_bad=0.1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "train-quarantine.jsonl").read_text().splitlines()) == 3
    _shard(source, tmp_path / "out", max_bad=0.12)  # continues
    assert TarDataset(tmp_path / "out", "train").num_samples == NUM_IMAGES


def test_a_shard_without_a_good_image_is_left_out(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for index in range(6):
        (source / f"{index}.png").write_bytes(_encoded(_photo(index), "PNG"))
    for index in permutation(6, 0)[2:4]:
        (source / f"{index}.png").write_bytes(b"bad")
    files = _shard(source, tmp_path / "out", shard_samples=2, max_bad=0.5)
    assert "train-000001.tar" not in files
    assert TarDataset(tmp_path / "out", "train").num_samples == 4


def test_only_bad_images_are_refused_whatever_max_bad(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"bad")
    with pytest.raises(UserError, match="1 of 1 images are bad"):
        _shard(tmp_path / "images", tmp_path / "out", max_bad=1.0)


# ---------------------------------------------------------------------------------------- mistakes


def test_a_split_that_is_there_already_is_left_as_it_is(source, tmp_path, capsys):
    out = tmp_path / "out"
    before = _shard(source, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert _shard(source, out, max_bad=0.2) == before
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "has the split 'train' already: 24 samples in 5 shards" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_samples": 4}, {"resize_shorter": 9}])
def test_another_split_under_the_same_name_is_refused(source, tmp_path, change):
    _shard(source, tmp_path / "out")
    (name,) = change
    with pytest.raises(UserError, match=f"has a split 'train' made with {name}"):
        _shard(source, tmp_path / "out", **change)


def test_other_images_under_the_same_split_are_refused(source, tmp_path):
    _shard(source, tmp_path / "out")
    (source / "cat" / "new.png").write_bytes(_encoded(_photo(), "PNG"))
    with pytest.raises(UserError, match="made with other images"):
        _shard(source, tmp_path / "out")


def test_another_unfinished_run_is_refused(source, tmp_path):
    (source / "cat" / "bad.png").write_bytes(b"bad")
    with pytest.raises(UserError, match="images are bad"):
        _shard(source, tmp_path / "out", max_bad=0)
    with pytest.raises(UserError, match="unfinished split 'train' made with shard_samples 5"):
        _shard(source, tmp_path / "out", shard_samples=6)


def test_two_runs_at_once_are_refused(source, tmp_path, monkeypatch):
    work = tmp_path / "out" / ".sharding-train"
    work.mkdir(parents=True)
    monkeypatch.setattr(work_folders, "LOCK_PATIENCE_S", 0.1)
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            _shard(source, tmp_path / "out")


def test_foreign_tars_are_not_overwritten(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000007.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-000007\.tar, which is not from this program"):
        _shard(source, out)
    assert _files(out) == {"train-000007.tar": b"mine"}


def test_files_that_are_not_images_are_counted(source, tmp_path, capsys):
    (source / "README.md").write_text("hello")
    (source / "cat" / "Thumbs.db").write_text("hello")
    (source / "cat" / "._1.JPG").write_text("hello")
    assert len(folder_source(source).images) == NUM_IMAGES
    assert "skipped 3 files that are not images" in capsys.readouterr().err


def test_images_beside_class_folders_are_refused(source):
    (source / "loose.png").write_bytes(_encoded(_photo(), "PNG"))
    with pytest.raises(UserError, match=r"images beside its class folders, such as loose\.png"):
        folder_source(source)


def test_a_class_folder_without_images_is_refused(source):
    (source / "bird").mkdir()
    with pytest.raises(UserError, match=r"class folder .*bird has no images"):
        folder_source(source)


def test_splits_are_not_taken_for_classes(source, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(source, tmp_path / "both" / split)
    with pytest.raises(UserError, match=r"holds the splits train, val.*both/train --split train"):
        folder_source(tmp_path / "both")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        folder_source(tmp_path)
    with pytest.raises(UserError, match=r"no image folder .*nowhere"):
        folder_source(tmp_path / "nowhere")


def test_out_inside_src_is_refused(source):
    with pytest.raises(UserError, match="lies inside SRC"):
        shard_folder(source, source / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", "a-b"),
        ("seed", -1),
        ("shard_mib", 0),
        ("shard_samples", 0),
        ("workers", 0),
        ("resize_shorter", 0),
        ("max_bad", 5),
    ],
)
def test_an_argument_out_of_range_is_named(source, tmp_path, name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        shard_folder(source, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_stops_the_run(source, tmp_path):
    listed = folder_source(source)
    os.unlink(source / "cat" / "1.png")
    with pytest.raises(UserError, match=r"cannot read .*cat/1\.png: No such file"):
        listed.read("cat/1.png")


def test_the_program_exits_with_2_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shard.py", str(tmp_path / "nowhere"), str(tmp_path / "o")])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "data_tools" / "shard.py"), run_name="__main__")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: no image folder {tmp_path / 'nowhere'}\n"
