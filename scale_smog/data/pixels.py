"""Views as pixels, in torch: the numbers of `augment.py` applied to decoded images, on any device.

The CPU loaders make one image after the other, the loader of sets in memory whole batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from scale_smog.data.augment import MEAN, SOLARIZE_THRESHOLD, STD, View, ViewNumbers, blur_window


def make_views(
    image: Tensor,
    row: int,
    views: Sequence[View],
    numbers: Sequence[ViewNumbers],
    outputs: Sequence[Tensor],
) -> None:
    """Makes all views of one decoded image of a batch.

    One image, not the batch: its crop stays in the core's cache through all steps, and its pixels
    are the same to the bit for any number of ranks.

    Args:
        image: [3, H, W] uint8.
        row: of the image in the batch.
        views: kinds of views.
        numbers: one entry a view, for the whole batch.
        outputs: one a view, [B, 3, px, px] float32; row `row` is written.
    """
    for view, of_batch, output in zip(views, numbers, outputs, strict=True):
        one = of_batch.row(row)
        cropped = crop(image, one.box[0], view.px, one.flip[0])[None]
        x = cropped.to(torch.float32, memory_format=torch.contiguous_format)
        output[row] = finish(x, view, one)[0]


def empty_views(views: Sequence[View], num_images: int) -> list[Tensor]:
    """Room for the views of B images: each [B, 3, px, px] float32, channels_last."""
    shapes = [(num_images, 3, view.px, view.px) for view in views]
    return [torch.empty(shape, memory_format=torch.channels_last) for shape in shapes]


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
    x = vision.resize(window, [px, px], InterpolationMode.BICUBIC, antialias=True)[0]
    return x.flip(-1) if flip else x


def finish(x: Tensor, view: View, numbers: ViewNumbers) -> Tensor:
    """All that follows the crop: colour, blur, solarise, normalise.

    Args:
        x: crops [B, 3, px, px] float32, 0 to 255, contiguous; may be overwritten.
        view: kind of view.
        numbers: for these B images.

    Returns:
        [B, 3, px, px] float32.
    """
    if view.has_colour:
        x = _recolour(x, numbers)
    if view.has_blur and numbers.sigma.any():
        x = _blur(x, numbers.sigma, blur_window(view.px))
    if view.has_solarize and numbers.solarize.any():
        solarize = _on(numbers.solarize, x)[:, None, None, None]
        x = torch.where(solarize & (x >= SOLARIZE_THRESHOLD), 255 - x, x)
    mean, std = (_on(v.astype(np.float32), x)[:, None, None] for v in (MEAN, STD))
    return x.sub_(mean).div_(std)


def _recolour(x: Tensor, numbers: ViewNumbers) -> Tensor:
    """The affine colour map, clipped to 0 to 255: [B, 3, H, W]."""
    pixels = x.flatten(2)  # [B, 3, H*W]
    mean = pixels.mean(2, keepdim=True)  # [B, 3, 1]
    offset = _on(numbers.from_mean, x) @ mean + _on(numbers.offset, x)[:, :, None]  # [B, 3, 1]
    return torch.baddbmm(offset, _on(numbers.colour, x), pixels).clamp_(0, 255).view_as(x)


def _blur(x: Tensor, sigma: np.ndarray, window: int) -> Tensor:
    """Gaussian blur of the images whose sigma is not 0: [B, 3, H, H].

    As two products with a banded matrix, which is faster than a convolution with a kernel of its
    own for every image.
    """
    rows = torch.from_numpy(np.flatnonzero(sigma)).to(x.device)  # n of B
    matrix = _blur_matrices(_on(sigma, x)[rows], x.shape[-1], window)[:, None]  # [n, 1, H, H]
    if len(rows) == len(x):
        return matrix @ x @ matrix.mT
    return x.index_copy(0, rows, matrix @ x[rows] @ matrix.mT)


def _blur_matrices(sigma: Tensor, px: int, window: int) -> Tensor:
    """[n, px, px]: row i holds the kernel of one sigma [n] about pixel i, reflected at the ends."""
    source, distance = _taps(px, window, sigma.device)  # [px, window], [window]
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [n, window]
    # Such weights change no pixel, but denormal numbers make the product seven times slower.
    kernel = torch.where(kernel < 1e-9, 0, kernel)
    shape = (len(sigma), px, window)
    matrices = sigma.new_zeros(len(sigma), px, px)
    return matrices.scatter_add_(2, source.expand(shape), kernel[:, None].expand(shape))


@lru_cache(maxsize=8)
def _taps(px: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which pixel [px, window] each tap of each row reads, and the taps' distance [window]."""
    distance = np.arange(window) - window // 2
    source = np.abs(np.arange(px)[:, None] + distance)
    source = np.minimum(source, 2 * (px - 1) - source)
    return torch.from_numpy(source).to(device), torch.from_numpy(distance).float().to(device)


def _on(values: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(x.device, non_blocking=True)
