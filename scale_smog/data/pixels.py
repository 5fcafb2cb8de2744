"""Views as pixels, in torch: sampled parameters applied to decoded images, on any device.

The CPU loaders make one image after the other, the loader of sets in memory whole batches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from scale_smog.data.augment import (
    MEAN,
    SOLARIZE_THRESHOLD,
    STD,
    AugmentationParams,
    View,
    blur_window,
)

BLUR_BLOCK_PX = 32  # rows or columns that share a product; of 28 to 112, the fastest

_MEAN, _STD = (torch.from_numpy(v).float()[:, None, None] for v in (MEAN, STD))  # [3, 1, 1]


def make_views(
    image: Tensor,
    row: int,
    views: Sequence[View],
    params: Sequence[AugmentationParams],
    outputs: Sequence[Tensor],
) -> None:
    """Makes all views of one decoded image of a batch.

    One image, not the batch: its crop stays in the core's cache through all steps, and its pixels
    are the same to the bit for any number of ranks.

    Args:
        image: [3, H, W] uint8.
        row: of the image in the batch.
        views: kinds of views.
        params: one entry a view, for the whole batch.
        outputs: one a view, [B, 3, px, px] float32; row `row` is written.
    """
    for view, of_batch, output in zip(views, params, outputs, strict=True):
        one = of_batch.row(row)
        cropped = crop(image, one.box[0], view.px, one.flip[0])[None]
        x = cropped.to(torch.float32, memory_format=torch.contiguous_format)
        output[row] = augment_crops(x, view, one)[0]


def empty_views(views: Sequence[View], num_images: int, pinned: bool = False) -> list[Tensor]:
    """Room for the views of B images: each [B, 3, px, px] float32, channels_last.

    Pinned, copies of them to a GPU do not wait for it.
    """
    shapes = [(num_images, 3, view.px, view.px) for view in views]
    keys = {"memory_format": torch.channels_last, "pin_memory": pinned}
    return [torch.empty(shape, **keys) for shape in shapes]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from splitting an operation: threads cost more than they give one small crop,
    and the pixels must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def crop(image: Tensor, box: np.ndarray, px: int, flip: bool) -> Tensor:
    """A box of an image [3, H, W] uint8, resized and perhaps mirrored: [3, px, px] uint8.

    Args:
        image: decoded.
        box: left, top, width, height.
        px: side of the result.
        flip: left becomes right.
    """
    left, top, width, height = box.tolist()
    window = image[:, top : top + height, left : left + width]
    # torch's fast path for 8 bits wants the colours of a pixel side by side.
    window = window[None].contiguous(memory_format=torch.channels_last)
    x = interpolate(window, (px, px), mode="bicubic", antialias=True)[0]
    return x.flip(-1) if flip else x


def augment_crops(x: Tensor, view: View, params: AugmentationParams) -> Tensor:
    """All that follows the crop: colour, blur, solarise, normalise.

    Args:
        x: crops [B, 3, px, px] float32, 0 to 255, contiguous; may be overwritten.
        view: kind of view.
        params: for these B images.

    Returns:
        [B, 3, px, px] float32.
    """
    if view.has_colour:
        x = _recolour(x, params)
    if view.has_blur and params.sigma.any():
        x = _blur(x, params.sigma, blur_window(view.px))
    if view.has_solarize and params.solarize.any():
        solarize = _on(params.solarize, x)[:, None, None, None]
        x = torch.where(solarize & (x >= SOLARIZE_THRESHOLD), 255 - x, x)
    mean, std = _normalisation(x.device)
    return x.sub_(mean).div_(std)


def _recolour(x: Tensor, params: AugmentationParams) -> Tensor:
    """The affine colour map, clipped to 0 to 255: [B, 3, H, W]."""
    pixels = x.flatten(2)  # [B, 3, H*W]
    mean = pixels.mean(2, keepdim=True)  # [B, 3, 1]
    offset = _on(params.from_mean, x) @ mean + _on(params.offset, x)[:, :, None]  # [B, 3, 1]
    return torch.baddbmm(offset, _on(params.colour, x), pixels).clamp_(0, 255).view_as(x)


def _blur(x: Tensor, sigma: np.ndarray, window: int) -> Tensor:
    """Gaussian blur of the images whose sigma is not 0, reflected at the edges: [B, 3, H, H]."""
    rows = _on(np.flatnonzero(sigma), x)  # n of B
    band = _blur_bands(_on(sigma, x)[rows], x.shape[-1], window)
    if len(rows) == len(x):
        return _blur_all(x, band)
    return x.index_copy(0, rows, _blur_all(x[rows], band))


def _blur_all(x: Tensor, band: Tensor) -> Tensor:
    """Both passes of a blur as products with a band, block by block of rows, then of columns.

    At 224 px, on a CPU: half of the time of products with the whole [H, H] matrix, a third of that
    of a convolution.

    Args:
        x: [n, 3, H, H].
        band: [n, 1, 1, block, reach], of `_blur_bands`.
    """
    block, reach = band.shape[-2:]
    radius = (reach - block) // 2
    padded = pad(x, [radius] * 4, mode="reflect")  # [n, 3, H + 2 radius, H + 2 radius]
    rows = band @ padded.unfold(2, reach, block).mT  # [n, 3, H / block, block, H + 2 radius]
    windows = rows.flatten(2, 3).unfold(3, reach, block).movedim(3, 2)
    columns = windows @ band.mT  # [n, 3, H / block, H, block]
    return columns.movedim(2, 3).flatten(3)


def _blur_bands(sigma: Tensor, px: int, window: int) -> Tensor:
    """[n, 1, 1, block, reach]: row i holds the kernel of one sigma [n], shifted by i."""
    distance = torch.arange(window, device=sigma.device) - window // 2
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # [n, window]
    kernel = kernel / kernel.sum(1, keepdim=True)
    # Such weights change no pixel, but denormal numbers make the product seven times slower.
    kernel = torch.where(kernel < 1e-9, 0, kernel)
    block = math.gcd(px, BLUR_BLOCK_PX)
    reach = block + window - 1
    bands = sigma.new_zeros(len(sigma), block, reach)
    shifted = bands.as_strided((len(sigma), block, window), (block * reach, reach + 1, 1))
    shifted.copy_(kernel[:, None].expand_as(shifted))
    return bands[:, None, None]


def _on(values: np.ndarray, x: Tensor) -> Tensor:
    return on_device(values, x.device)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on a device; from pinned memory, so that the host does not wait for a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, [3, 1, 1] each; copied to a device once."""
    return _MEAN.to(device), _STD.to(device)
