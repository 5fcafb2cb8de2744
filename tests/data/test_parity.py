"""Operation by operation, DALI and torch do the same to a view."""

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scale_smog.config import AugmentConfig
from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.augment import STD, AugmentationParams, RandomView
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.memory import MemoryLoader
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.data.prepare.shard import shard_folder

CPU = torch.device("cpu")
PX = 96
STRENGTHS = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
NONE = AugmentConfig(flip=0, jitter=0, grey=0, **STRENGTHS)


@dataclass(frozen=True)
class WholeImage(RandomView):
    """A view of the whole image, so that nothing is resized."""

    is_whole: bool = field(default=True)

    def sample(self, seed, ids, epochs, widths, heights) -> AugmentationParams:
        box = np.stack([0 * widths, 0 * widths, widths, heights], axis=1).astype(np.int32)
        return replace(super().sample(seed, ids, epochs, widths, heights), box=box)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen PNG pictures of 96 px: the full range of colours, as smooth as photographs."""
    folder = tmp_path_factory.mktemp("parity")
    for i in range(16):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((PX, PX), Image.Resampling.BICUBIC).save(path)
    shard_folder(folder / "images", folder / "tars", workers=1)
    return TarDataset(folder / "tars", "train")


def jitter(**strengths):
    return NONE.model_copy(update={"jitter": 1.0, **strengths})


def whole(augment=NONE, blur=0.0, solarize=0.0):
    return WholeImage(augment, 0, PX, (0.2, 1.0), blur, solarize)


# Name: view, largest difference in grey levels of 255 at any pixel.
OPERATIONS = {
    "decode": (whole(), 0),
    "crop and resize": (RandomView(NONE, 0, 64, (0.2, 1.0), 0.0, 0.0), 2),
    "crop and enlarge": (RandomView(NONE, 0, PX, (0.05, 0.2), 0.0, 0.0), 2),
    "flip": (whole(NONE.model_copy(update={"flip": 0.5})), 0),
    "brightness": (whole(jitter(brightness=0.4)), 1),
    "contrast": (whole(jitter(contrast=0.4)), 1),
    "saturation": (whole(jitter(saturation=0.2)), 1),
    "hue": (whole(jitter(hue=0.1)), 1),
    "grey": (whole(NONE.model_copy(update={"grey": 1.0})), 1),
    "blur": (whole(blur=1.0), 0.6),
    "solarize": (whole(solarize=1.0), 0),
}


def pixels(loader):
    """[64, 3, px, px] in grey levels: four epochs of the sixteen pictures."""
    views = torch.cat([batch.large[0] for batch in loader])
    return views * torch.tensor(STD, dtype=torch.float32)[:, None, None]


def source_of(photos, name):
    view, _ = OPERATIONS[name]
    return BatchSource(photos, EpochPlan(16, 16, seed=1), [view], 1, 0, 1)


@pytest.fixture(scope="module")
def torchs(photos):
    """Torch's views of an operation, made once."""
    return cache(lambda name: pixels(TorchLoader(source_of(photos, name), range(4), 0, CPU)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_dalis_graph_is_torchs_within_its_tolerance(photos, torchs, name):
    dali = pytest.importorskip("scale_smog.data.loaders.dali")
    source, (_, tolerance) = source_of(photos, name), OPERATIONS[name]
    ours = pixels(dali.DaliLoader(source, range(4), 1, CPU, on_gpu=False))
    assert (ours - torchs(name)).abs().max() < tolerance + 1e-2
    cpu = pixels(dali.DaliCpuLoader(source, range(4), 2, CPU))
    assert torch.equal(cpu, torchs(name))  # PNG: the decoders agree to the bit


@pytest.mark.parametrize("name", OPERATIONS)
def test_views_of_a_set_in_memory_are_torchs_within_the_same_tolerance(photos, torchs, name):
    source, (_, tolerance) = source_of(photos, name), OPERATIONS[name]
    ours = pixels(MemoryLoader(source, range(4), CPU))
    assert (ours - torchs(name)).abs().max() < tolerance + 1e-2


@pytest.mark.real_images
@pytest.mark.skipif(not os.environ.get("SCALE_SMOG_TEST_DATA"), reason="no SCALE_SMOG_TEST_DATA")
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.2)])
def test_crops_of_photographs_agree_to_two_grey_levels_but_for_their_rims(tmp_path, scale):
    """PNG copies of sixteen photographs, so that only the crops are compared.

    At the rim, where the kernel reaches beyond the crop, DALI repeats the last pixel and torch
    leaves the others their weight: up to seven levels of ImageNet's photographs, 0.01 on average.
    """
    dali = pytest.importorskip("scale_smog.data.loaders.dali")
    files = sorted(Path(os.environ["SCALE_SMOG_TEST_DATA"]).rglob("*.[jJ][pP]*[gG]"))
    if not files:
        pytest.skip("no photographs in SCALE_SMOG_TEST_DATA")
    (tmp_path / "images").mkdir()
    for i, path in enumerate(files[:: max(1, len(files) // 16)][:16]):
        Image.open(path).convert("RGB").save(tmp_path / "images" / f"{i:02d}.png")
    shard_folder(tmp_path / "images", tmp_path / "tars", workers=1)
    view = RandomView(NONE, 0, 224, scale, 0.0, 0.0)
    source = BatchSource(
        TarDataset(tmp_path / "tars", "train"), EpochPlan(16, 16, seed=1), [view], 1, 0, 1
    )
    torch_views = pixels(TorchLoader(source, range(2), 0, CPU))
    from_memory = pixels(MemoryLoader(source, range(2), CPU))
    assert (from_memory - torch_views).abs().max() < 2 + 1e-2
    dali_views = pixels(dali.DaliLoader(source, range(2), 1, CPU, on_gpu=False))
    difference = (dali_views - torch_views).abs()
    rim = 10 if scale[0] < 0.2 else 4  # px: two pixels of the crop, as large as they may become
    assert difference[:, :, rim:-rim, rim:-rim].max() < 2 + 1e-2
    assert difference.mean() < 0.03


def test_a_set_too_large_for_the_device_is_refused(photos, monkeypatch):
    monkeypatch.setattr("scale_smog.data.loaders.memory._CPU_BYTES", 2**18)
    source = BatchSource(photos, EpochPlan(16, 16), [whole()], 0, 0, 1)
    with pytest.raises(ValueError, match=r"take data\.loader=dali"):
        MemoryLoader(source, range(1), CPU)
