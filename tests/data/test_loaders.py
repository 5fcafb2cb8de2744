"""The two loaders make the same batches from one plan."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.config import AugmentConfig, DataConfig, EvaluationConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import STD, training_views
from scale_smog.data.loaders.build import (
    build_evaluation_loader,
    build_training_loader,
    open_together,
    require_loader,
    with_random_access,
)
from scale_smog.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent
has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not has_dali, reason="nvidia-dali is not installed")
LOADERS = ["torch", pytest.param("dali", marks=needs_dali), "memory"]


def load(tars, loader, steps, augment=None, **data_keys):
    return list(load_one_by_one(tars, loader, steps, augment, **data_keys))


def load_one_by_one(tars, loader, steps, augment=None, **data_keys):
    keys = {"global_batch": 8, "workers": 0, "num_small_crops": 2, "large_px": 48, "small_px": 24}
    data = DataConfig(path=str(tars), loader=loader, **(keys | data_keys))
    dataset = TarDataset(tars, "train")
    plan = EpochPlan(dataset.num_samples, data.global_batch, seed=3)
    views = training_views(data, augment or AugmentConfig())
    return iter(build_training_loader(data, views, dataset, plan, steps, CPU))


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_have_the_contracts_shapes(tars, loader):
    (batch,) = load(tars, loader, range(1))
    assert [tuple(v.shape) for v in batch.large] == [(8, 3, 48, 48)] * 2
    assert [tuple(v.shape) for v in batch.small] == [(8, 3, 24, 24)] * 2
    assert all(v.dtype == torch.float32 for v in [*batch.large, *batch.small])
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in batch.large)
    assert batch.label.dtype == batch.sample_id.dtype == torch.int64
    dataset = TarDataset(tars, "train")
    assert (batch.label.numpy() == dataset.labels[batch.sample_id.numpy()]).all()


@needs_dali
def test_dali_and_torchvision_make_the_same_views(tars):
    """Within 3 of 255 grey levels at the worst pixel, 0.3 on average."""
    ours, theirs = load(tars, "dali", range(4)), load(tars, "torch", range(4))
    std = torch.tensor(STD)[:, None, None]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.sample_id == b.sample_id).all()
        for x, y in zip([*a.large, *a.small], [*b.large, *b.small], strict=True):
            # Solarisation is a jump: a pixel at the threshold may fall on either side.
            difference = ((x - y).abs() * std).flatten()
            jumps = difference > 3
            assert jumps.float().mean() < 1e-3
            assert difference[~jumps].mean() < 0.3


@pytest.mark.parametrize("loader", LOADERS)
def test_a_restart_at_any_step_gives_the_same_pixels(tars, loader):
    whole = load(tars, loader, range(12))  # 12 x 8 of 40 samples: past two epochs
    for start in (1, 5, 9):
        for a, b in zip(whole[start:], load(tars, loader, range(start, 12)), strict=True):
            assert torch.equal(a.sample_id, b.sample_id)
            assert all(torch.equal(x, y) for x, y in zip(a.large, b.large, strict=True))
            assert all(torch.equal(x, y) for x, y in zip(a.small, b.small, strict=True))


SIGNALLED = """
import multiprocessing, os, psutil, signal, sys
sys.path[:0] = "tests/data", "tests/helpers"
from test_loaders import load_one_by_one

if __name__ == "__main__":
    os.setsid()
    signals = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    for number in signals:
        signal.signal(number, lambda *_: None)  # as a rank that will stop after its step
    batches = load_one_by_one(sys.argv[1], "torch", range(40), workers=1)
    next(batches)
    [worker] = multiprocessing.active_children()
    forked_from = psutil.Process(worker.pid).parent()
    print("libtorch_cpu" in str(forked_from.memory_maps()))
    print("torchvision" in str(forked_from.memory_maps()))
    for number in signals:
        os.killpg(0, number)  # as torchrun and a terminal do
    print(sum(1 for _ in batches), flush=True)
    batches = load_one_by_one(sys.argv[1], "torch", range(40), workers=1)
    next(batches)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_share_what_they_import_and_outlive_signals_to_their_rank_but_not_the_rank(tars):
    """The output is at its end when the last of them, which hold it too, has ended."""
    program = [sys.executable, "-c", SIGNALLED, str(tars)]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["True", "True", "39"], ended.stderr


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_do_not_depend_on_the_number_of_workers(tars, loader):
    one, three = load(tars, loader, range(3), workers=1), load(tars, loader, range(3), workers=3)
    for a, b in zip(one, three, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.large, b.large, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_in_hand_is_not_overwritten(tars, loader):
    data = load(tars, loader, range(6))  # all held at once
    again = load(tars, loader, range(6))
    assert all(torch.equal(a.large[0], b.large[0]) for a, b in zip(data, again, strict=True))
    assert not torch.equal(data[0].large[0], data[5].large[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_without_augmentation_the_evaluation_crop_is_the_picture(tars, loader):
    data = DataConfig(path=str(tars), loader=loader, workers=0)
    dataset = TarDataset(tars, "test")
    config = EvaluationConfig(batch=8, image_px=32, crop_share=1.0)
    ids = np.arange(dataset.num_samples)
    batches = list(build_evaluation_loader(data, config, dataset, ids, CPU))
    seen = torch.cat([b.sample_id for b in batches])
    assert seen[: len(ids)].tolist() == ids.tolist()
    pixels = batches[0].large[0][0] * torch.tensor(STD)[:, None, None] / 255
    assert pixels.std() > 0.05  # a picture, not a constant


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_a_worker_too(tars, tmp_path, workers):
    shutil.copytree(tars, tmp_path / "tars")
    place = TarDataset(tars, "train")._index.place(0)
    with open(tmp_path / "tars" / place.tar, "r+b") as tar:
        tar.seek(place.offset)
        tar.write(bytes(40))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "tars", "torch", range(5), workers=workers)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert "train-00000" in str(caught.value)


def test_a_gpu_that_is_not_there_is_named(tars):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"data\.device=gpu"):
        load(tars, "torch", range(1), device="gpu")


def test_dali_missing_is_one_clear_line(tars, monkeypatch):
    monkeypatch.setitem(sys.modules, "scale_smog.data.loaders.dali", None)
    with pytest.raises(UserError, match=r"data\.loader=torch"):
        load(tars, "dali", range(1))


@pytest.mark.parametrize("loader", ["torch", "stream"])
def test_a_loader_of_the_cpu_is_not_replaced_where_a_gpu_is_to_make_the_views(loader):
    url = {"stream": "https://host/a.tar"} if loader == "stream" else {}
    data = DataConfig(path="", loader=loader, device="gpu", **url)
    with pytest.raises(UserError, match=rf"loader={loader} makes its views on the CPU.*memory"):
        require_loader(data, torch.device("cuda"))


@pytest.mark.parametrize("loader", ["memory", "torch", "stream", "dali", "fast"])
def test_evaluations_get_a_loader_of_any_samples_whatever_the_run_had(loader):
    url = {"stream": "https://host/a.tar"} if loader == "stream" else {}
    data = with_random_access(DataConfig(path="", loader=loader, device="gpu", **url))
    assert data.loader == ("dali" if loader in ("dali", "fast") else "torch")
    assert data.device == ("gpu" if loader in ("dali", "fast") else "auto")
    assert data.stream == ""


def opened_together(copies: list[Path]) -> tuple[list[str], bytes]:
    """Files that opening a split opens on this rank, and an image of this rank's copy."""
    opened: list[str] = []
    folder = copies[distributed.rank()]

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder.parent)):
            opened.append(Path(arguments[0]).suffix)

    sys.addaudithook(note)  # stays; the process ends with the function
    dataset = open_together(str(folder), "train")
    during = list(opened)
    assert dataset.tar_paths[0].startswith(str(folder))
    return during, dataset.read(17)


def test_a_split_is_read_by_rank_0_for_all_and_images_from_each_hosts_copy(tmp_path, tars):
    copies = [shutil.copytree(tars, tmp_path / name) for name in ("a", "b")]
    (first, image), (second, same_image) = run_on_ranks(2, opened_together, copies)
    assert ".json" in first and ".npy" in first and not second
    assert image == same_image == TarDataset(tars, "train").read(17)
