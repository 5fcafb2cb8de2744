"""The built-in labelled image set: ten kinds of shapes, several copies of one kind per image.

Every copy has its own colour, size and rotation, so colour says nothing about the class, and any
crop of an image shows it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scale_smog.data.images import ImageEntry
from scale_smog.data.prepare.shard import shard_source
from scale_smog.data.prepare.sources import Source

SIDE_PX = 64
NUM_IMAGES = {"train": 8000, "test": 2000}

_SUPERSAMPLING = 3  # shapes are drawn at 192 px and box-reduced
_NUM_COPIES = (4, 7)
_RADIUS_PX = (8.0, 13.0)
_MAX_ROTATION = np.deg2rad(25)
_ASPECT = (0.9, 1.1)
_MIN_LUMINANCE_STEP = 0.22
_TEXTURE_AMPLITUDE = 0.05
_PIXEL_NOISE = 0.02
_JPEG_QUALITY = 90
_NOMINAL_BYTES = 2048  # of one image, for planning the shards
_SHARD_SAMPLES = 1000  # so that the test split, too, is work for two processes
_LUMINANCE = np.array([0.299, 0.587, 0.114])


# ---------------------------------------------------------- outlines in the unit circle, [P, 2]


def _arc(radius: float, start: float, stop: float) -> np.ndarray:
    """Points on a circle; angles in turns."""
    angles = 2 * np.pi * np.linspace(start, stop, 49)
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star() -> np.ndarray:
    angles = 2 * np.pi * np.arange(10) / 10
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return radii[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 18.2


def _crescent() -> np.ndarray:
    """A disc less a smaller one whose centre lies to the right; both arcs meet at the horns."""
    outer = _arc(1.0, 0.39, 1.11)
    offset = np.array([0.45, 0.0])
    x, y = outer[-1] - offset  # the upper horn, seen from the smaller disc
    horn = float(np.arctan2(x, -y)) / (2 * np.pi)
    inner = offset + _arc(float(np.hypot(x, y)), horn, -0.5 - horn)
    return np.concatenate([outer, inner])


_PLUS = [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)]
_ARROW = [(-0.95, -0.22), (0.1, -0.22), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.22), (-0.95, 0.22)]
_L = [(-0.6, -0.8), (-0.1, -0.8), (-0.1, 0.35), (0.6, 0.35), (0.6, 0.8), (-0.6, 0.8)]

# In the order of the labels.
OUTLINES: dict[str, np.ndarray] = {
    "disc": _arc(1.0, 0, 1),
    "ring": np.concatenate([_arc(1.0, 0, 1), _arc(0.55, 1, 0)]),
    "square": _arc(1.0, 0.125, 1.125)[::12],
    "triangle": _arc(1.0, 0, 1)[::16],
    "star": _star(),
    "plus": np.concatenate([_PLUS, -np.array(_PLUS)]),
    "heart": _heart(),
    "crescent": _crescent(),
    "arrow": np.array(_ARROW),
    "L": np.array(_L),
}
CLASSES = tuple(OUTLINES)


# ---------------------------------------------------------------------------------------- drawing


def draw(class_index: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one image of a class; the same state of `rng` gives the same image.

    Returns:
        uint8 [64, 64, 3], RGB.
    """
    outline = OUTLINES[CLASSES[class_index]]
    background = rng.random(3)
    side = SIDE_PX * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _rgb(background))
    mask = Image.new("L", canvas.size)
    for x, y, radius in _places(rng):
        points = _SUPERSAMPLING * ([x, y] + radius * _varied(outline, rng))  # [P, 2]
        points = points.ravel().tolist()
        ImageDraw.Draw(canvas).polygon(points, fill=_rgb(_contrasting(background, rng)))
        ImageDraw.Draw(mask).polygon(points, fill=255)

    image = np.asarray(canvas.reduce(_SUPERSAMPLING)) / 255  # [64, 64, 3]
    covered = np.asarray(mask.reduce(_SUPERSAMPLING))[:, :, None] / 255  # [64, 64, 1]
    image = image + (1 - covered) * _TEXTURE_AMPLITUDE * _texture(rng)[:, :, None]
    image = image + rng.normal(0, _PIXEL_NOISE, image.shape)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _places(rng: np.random.Generator) -> list[list[float]]:
    """Circles [x, y, radius], px, that lie inside the image and do not overlap."""
    num_wanted = rng.integers(*_NUM_COPIES, endpoint=True)
    while True:
        u, v, w = rng.random((3, 200))
        radius = _RADIUS_PX[0] + u * (_RADIUS_PX[1] - _RADIUS_PX[0])
        x, y = (radius + share * (SIDE_PX - 2 * radius) for share in (v, w))
        is_free = np.ones(len(radius), bool)
        chosen: list[int] = []
        while is_free.any() and len(chosen) < num_wanted:
            chosen.append(first := int(is_free.argmax()))
            distance = np.hypot(x - x[first], y - y[first])
            is_free &= distance >= radius + radius[first]  # this takes out `first` itself, too
        if len(chosen) == num_wanted:
            return np.stack([x, y, radius], axis=1)[chosen].tolist()


def _varied(outline: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The outline [P, 2] with a random aspect and rotation."""
    angle = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    cos, sin = np.cos(angle), np.sin(angle)
    return outline * [rng.uniform(*_ASPECT), 1] @ np.array([[cos, sin], [-sin, cos]])


def _contrasting(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        colour = rng.random(3)
        if abs((colour - background) @ _LUMINANCE) >= _MIN_LUMINANCE_STEP:
            return colour


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(channel)) for channel in colour)
    return red, green, blue


def _texture(rng: np.random.Generator) -> np.ndarray:
    """None, a gradient, white or smooth noise of unit amplitude; float [64, 64]."""
    kind = rng.integers(4)
    if kind == 0:
        return np.zeros((SIDE_PX, SIDE_PX))
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        axis = np.linspace(-1, 1, SIDE_PX)
        return np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    if kind == 2:
        return rng.normal(size=(SIDE_PX, SIDE_PX))
    coarse = Image.fromarray(rng.normal(size=(8, 8)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------- the dataset


@dataclass(frozen=True)
class _DemoReader:
    """Draws the image that a name such as `train/000123-heart.jpg` stands for."""

    seed: int

    def __call__(self, name: str) -> bytes:
        split, _, rest = name.partition("/")
        index = int(rest.partition("-")[0])
        rng = np.random.default_rng([self.seed, list(NUM_IMAGES).index(split), index])
        encoded = BytesIO()
        image = Image.fromarray(draw(index % len(CLASSES), rng))
        image.save(encoded, "JPEG", quality=_JPEG_QUALITY)
        return encoded.getvalue()


def _listing(split: str) -> Iterator[ImageEntry]:
    for index in range(NUM_IMAGES[split]):
        label = index % len(CLASSES)
        name = f"{split}/{index:06d}-{CLASSES[label]}.jpg"
        yield ImageEntry(name, label, _NOMINAL_BYTES)


def make_demo(out: str | Path, *, seed: int = 0) -> None:
    """Writes the train (8,000 images) and test (2,000) splits to the dataset folder `out`.

    Splits that are there already are left as they are.

    Raises:
        UserError: `out` holds other splits of these names.
    """
    for split in NUM_IMAGES:
        source = Source(CLASSES, tuple(_listing(split)), _DemoReader(seed))
        shard_source(source, out, split=split, seed=seed, shard_samples=_SHARD_SAMPLES)
