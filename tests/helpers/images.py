"""Small datasets of real image files for tests."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from scale_smog.data.prepare.shard import shard_folder


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture: like a photograph, it survives JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """The picture as a JPEG file."""
    out = BytesIO()
    photo(width, height, seed).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_dataset(folder: Path, num_images: int = 40, num_classes: int = 4, px: int = 40) -> Path:
    """Tar shards of train and test images; sizes differ from image to image."""
    for split, count, first_seed in (("train", num_images, 0), ("test", num_images // 2, 10_000)):
        source = folder / f"source-{split}"
        for i in range(count):
            place = source / f"class{i % num_classes}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:04d}.jpg").write_bytes(jpeg(px + i % 7, px + i % 5, first_seed + i))
        shard_folder(source, folder / "tars", split=split, shard_samples=16, workers=1)
    return folder / "tars"
