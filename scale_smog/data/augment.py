"""Views as parameters: crop windows, colour maps, blur and solarisation, sampled before decoding.

A view of a sample is a pure function of (seed, sample id, epoch, view), so that every loader makes
the same picture of it, on any rank and after any restart.
"""

from dataclasses import dataclass

import numpy as np

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.counter_rng import uniforms

Array = np.ndarray

MEAN = np.array([0.485, 0.456, 0.406]) * 255  # ImageNet's, as torchvision's models expect
STD = np.array([0.229, 0.224, 0.225]) * 255
LUMA = np.array([0.299, 0.587, 0.114])
SOLARIZE_THRESHOLD = 128.0
ASPECT = (3 / 4, 4 / 3)
SIGMA = (0.1, 2.0)  # px
NUM_CROP_TRIES = 10

_RGB_TO_YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_GREY = np.tile(LUMA, (3, 1))  # [3, 3]: every channel becomes the luma


@dataclass(frozen=True)
class AugmentationParams:
    """What to do to B images to make one view of each; pixel values run from 0 to 255.

    In this order: crop `box`, resize, flip, colour, blur, solarise. The colour step maps a pixel
    x of a crop with mean colour m to clip(`colour` x + `from_mean` m + `offset`).
    """

    box: Array  # [B, 4] int32: left, top, width, height
    flip: Array  # [B] bool
    colour: Array  # [B, 3, 3] float32
    from_mean: Array  # [B, 3, 3] float32
    offset: Array  # [B, 3] float32
    sigma: Array  # [B] float32; 0: no blur
    solarize: Array  # [B] bool

    def row(self, index: int) -> "AugmentationParams":
        """The parameters of one image, still with a batch dimension of 1."""
        return self.rows(slice(index, index + 1))

    def rows(self, which: slice) -> "AugmentationParams":
        """The parameters of some of the images."""
        return AugmentationParams(**{name: v[which] for name, v in vars(self).items()})


def blur_window(px: int) -> int:
    """Width of the blur kernel: a tenth of the view, odd (BYOL: 23 at 224 px, 9 at 96 px)."""
    return px // 10 | 1


def training_views(data: DataConfig, augment: AugmentConfig) -> "list[View]":
    """Scheme A, scheme B, then the small crops, which share scheme B's blur and solarisation."""
    blur_a, blur_b = augment.blur
    solarize_a, solarize_b = augment.solarize
    large = [
        RandomView(augment, 0, data.large_px, augment.large_scale, blur_a, solarize_a),
        RandomView(augment, 1, data.large_px, augment.large_scale, blur_b, solarize_b),
    ]
    small = [
        RandomView(augment, 2 + i, data.small_px, augment.small_scale, blur_b, solarize_b, True)
        for i in range(data.num_small_crops)
    ]
    return [*large, *small]


@dataclass(frozen=True)
class RandomView:
    """A randomly cropped, coloured, blurred and solarised view (BYOL appendix B)."""

    augment: AugmentConfig
    stream: int  # tells the views of one sample apart
    px: int
    scale: tuple[float, float]
    blur: float
    solarize: float
    small: bool = False

    @property
    def has_colour(self) -> bool:
        return self.augment.jitter > 0 or self.augment.grey > 0

    @property
    def has_blur(self) -> bool:
        return self.blur > 0

    @property
    def has_solarize(self) -> bool:
        return self.solarize > 0

    def sample(
        self,
        seed: int,
        ids: Array,
        epochs: Array,
        widths: Array,
        heights: Array,
    ) -> AugmentationParams:
        """Draws the parameters of B views.

        Args:
            seed: of the run.
            ids: sample ids [B] int64.
            epochs: [B] int64.
            widths: of the stored images [B], px.
            heights: [B], px.
        """
        counts = (2 * NUM_CROP_TRIES, 2, 1, 1, 4, 1, 2, 1)
        draws = uniforms(seed, ids, epochs, self.stream, sum(counts))  # [B, 32]
        tries, place, flip, jitter, factors, grey, blur, solarize = np.split(
            draws, np.cumsum(counts)[:-1], axis=1
        )
        jittered, greyed = jitter[:, 0] < self.augment.jitter, grey[:, 0] < self.augment.grey
        colour, from_mean, offset = _colour_maps(self.augment, factors, jittered, greyed)
        sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * blur[:, 1]
        return AugmentationParams(
            box=_crop_boxes(tries, place, widths, heights, self.scale),
            flip=flip[:, 0] < self.augment.flip,
            colour=colour,
            from_mean=from_mean,
            offset=offset,
            sigma=np.where(blur[:, 0] < self.blur, sigma, 0).astype(np.float32),
            solarize=solarize[:, 0] < self.solarize,
        )


@dataclass(frozen=True)
class CentreView:
    """The centre square for evaluation: `crop_share` of the shorter side, resized to `px`."""

    px: int
    crop_share: float
    small: bool = False
    has_colour: bool = False
    has_blur: bool = False
    has_solarize: bool = False

    def sample(
        self,
        seed: int,
        ids: Array,
        epochs: Array,
        widths: Array,
        heights: Array,
    ) -> AugmentationParams:
        """The same for every epoch and seed."""
        size = np.maximum(1, np.rint(np.minimum(widths, heights) * self.crop_share))  # [B]
        box = np.stack([(widths - size) // 2, (heights - size) // 2, size, size], axis=1)
        num = len(ids)
        return AugmentationParams(
            box=box.astype(np.int32),
            flip=np.zeros(num, dtype=bool),
            colour=np.tile(np.eye(3, dtype=np.float32), (num, 1, 1)),
            from_mean=np.zeros((num, 3, 3), dtype=np.float32),
            offset=np.zeros((num, 3), dtype=np.float32),
            sigma=np.zeros(num, dtype=np.float32),
            solarize=np.zeros(num, dtype=bool),
        )


View = RandomView | CentreView


def _crop_boxes(
    tries: Array,
    place: Array,
    widths: Array,
    heights: Array,
    scale: tuple[float, float],
) -> Array:
    """Boxes [B, 4] int32 of random area and aspect: the first of ten tries that fits.

    Args:
        tries: uniforms [B, 20] for area and aspect.
        place: uniforms [B, 2] for the position.
        widths: [B], px.
        heights: [B], px.
        scale: range of the area as a share of the image's.
    """
    width, height = widths[:, None].astype(np.int64), heights[:, None].astype(np.int64)  # [B, 1]
    area_draw, aspect_draw = np.split(tries, 2, axis=1)  # [B, 10] each
    area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
    aspect = np.exp(np.log(ASPECT[0]) + np.log(ASPECT[1] / ASPECT[0]) * aspect_draw)
    w = np.maximum(1, np.rint(np.sqrt(area * aspect))).astype(np.int64)
    h = np.maximum(1, np.rint(np.sqrt(area / aspect))).astype(np.int64)
    # Where no try fits (a very long image) the largest box of an allowed aspect is taken.
    w = np.concatenate([w, np.minimum(width, np.rint(height * ASPECT[1]).astype(np.int64))], axis=1)
    h = np.concatenate([h, np.minimum(height, np.rint(width / ASPECT[0]).astype(np.int64))], axis=1)
    first = np.argmax((w <= width) & (h <= height), axis=1)[:, None]  # [B, 1]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    left = np.floor(place[:, 0] * (widths - w + 1))
    top = np.floor(place[:, 1] * (heights - h + 1))
    return np.stack([left, top, w, h], axis=1).astype(np.int32)


def _colour_maps(
    augment: AugmentConfig, factors: Array, jittered: Array, greyed: Array
) -> tuple[Array, Array, Array]:
    """Jitter, then grey, as one affine map of a pixel and the crop's mean colour.

    Brightness adds and contrast stretches about each channel's mean, as BYOL has them; saturation
    blends with the luma and hue turns the YIQ chroma plane. In this form the four commute, so
    their random order needs no drawing. Values are clipped once, at the end.

    Args:
        augment: strengths.
        factors: uniforms [B, 4], for brightness, contrast, saturation, hue.
        jittered: [B] bool.
        greyed: [B] bool.

    Returns:
        colour [B, 3, 3], from_mean [B, 3, 3] and offset [B, 3], float32.
    """
    signed = (2 * factors - 1) * jittered[:, None]  # [B, 4] in [-1, 1); 0 changes nothing
    brightness, contrast, saturation, hue = signed.T[:, :, None, None]  # [B, 1, 1] each
    contrast, saturation = 1 + augment.contrast * contrast, 1 + augment.saturation * saturation
    saturate = saturation * np.eye(3) + (1 - saturation) * _GREY  # [B, 3, 3]
    chroma = saturate @ _hue_turn(2 * np.pi * augment.hue * hue[:, 0, 0])
    chroma = np.where(greyed[:, None, None], _GREY, chroma)  # neither step changes the luma
    offset = np.broadcast_to(255 * augment.brightness * brightness[:, 0], (len(factors), 3))
    maps = contrast * chroma, (1 - contrast) * chroma, offset
    colour, from_mean, offset = (np.ascontiguousarray(x, dtype=np.float32) for x in maps)
    return colour, from_mean, offset


def _hue_turn(angle: Array) -> Array:
    """Rotations [B, 3, 3] of the chroma plane by `angle` [B] radians, in RGB."""
    turn = np.tile(np.eye(3), (len(angle), 1, 1))
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    return _YIQ_TO_RGB @ turn @ _RGB_TO_YIQ
