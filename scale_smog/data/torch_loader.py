"""The torchvision loader: same plan, same views as DALI's, on the CPU with worker processes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from scale_smog.data.augment import MEAN, SOLARIZE_THRESHOLD, STD, View, ViewNumbers, blur_window
from scale_smog.data.batch import Batch
from scale_smog.data.batch_source import BatchSource


class TorchLoader:
    """Batches of `steps`, made by `workers` processes (0: by this one).

    Args:
        source: what to load.
        steps: of the plan.
        workers: processes; each makes whole batches.
        device: where the batches go.
    """

    def __init__(self, source: BatchSource, steps: range, workers: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self._device = device
        self._batches = DataLoader(
            _PlannedBatches(source),
            batch_size=None,  # an item is a whole batch
            sampler=steps,
            num_workers=workers,
            pin_memory=on_gpu,
            # Forking a process that already talks to a GPU or to other ranks is unsafe.
            multiprocessing_context="forkserver" if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        for views, label, sample_id, num_large in self._batches:
            views = [self._to_device(view) for view in views]
            label = label.to(self._device, non_blocking=True)
            yield Batch(views[:num_large], views[num_large:], label, sample_id)

    def _to_device(self, view: Tensor) -> Tensor:
        view = view.to(self._device, non_blocking=True)
        return view.contiguous(memory_format=torch.channels_last)


class _PlannedBatches(Dataset):
    """Item `step` is this rank's batch of that step."""

    def __init__(self, source: BatchSource):
        self.source = source

    def __getitem__(self, step: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
        source = self.source
        ids = source.ids(step)
        images = [_decode(data) for data in source.encoded(ids)]
        views = [
            make_view(images, view, numbers)
            for view, numbers in zip(source.views, source.numbers(step), strict=True)
        ]
        num_large = sum(not view.small for view in source.views)
        label = torch.from_numpy(source.dataset.labels[ids])
        return views, label, torch.from_numpy(ids), num_large


def _decode(data: np.ndarray) -> Tensor:
    """[3, H, W] uint8."""
    return decode_image(torch.from_numpy(data.copy()), mode=ImageReadMode.RGB)


def make_view(images: list[Tensor], view: View, numbers: ViewNumbers) -> Tensor:
    """One view of B decoded images.

    Args:
        images: B tensors [3, H, W] uint8.
        view: kind of view.
        numbers: its numbers for these images.

    Returns:
        [B, 3, px, px] float32, normalised, channels_last.
    """
    crops = [_crop(image, box, view.px) for image, box in zip(images, numbers.box, strict=True)]
    x = torch.stack(crops).float()  # [B, 3, px, px], 0 to 255
    flip = torch.from_numpy(numbers.flip)[:, None, None, None]
    x = torch.where(flip, x.flip(-1), x)
    if view.has_colour:
        x = _recolour(x, numbers)
    if view.has_blur:
        x = _blur(x, numbers.sigma, blur_window(view.px))
    if view.has_solarize:
        solarize = torch.from_numpy(numbers.solarize)[:, None, None, None] & (
            x >= SOLARIZE_THRESHOLD
        )
        x = torch.where(solarize, 255 - x, x)
    mean = torch.from_numpy(MEAN.astype(np.float32))[:, None, None]
    std = torch.from_numpy(STD.astype(np.float32))[:, None, None]
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _crop(image: Tensor, box: np.ndarray, px: int) -> Tensor:
    """[3, px, px] uint8: the box, resized."""
    left, top, width, height = box.tolist()
    window = image[:, top : top + height, left : left + width]
    return vision.resize(window, [px, px], InterpolationMode.BICUBIC, antialias=True)


def _recolour(x: Tensor, numbers: ViewNumbers) -> Tensor:
    """The affine colour map, clipped to 0 to 255: [B, 3, H, W]."""
    pixels = x.flatten(2)  # [B, 3, H*W]
    mean = pixels.mean(2, keepdim=True)  # [B, 3, 1]
    from_mean, offset = torch.from_numpy(numbers.from_mean), torch.from_numpy(numbers.offset)
    offset = from_mean @ mean + offset[:, :, None]  # [B, 3, 1]
    mapped = torch.baddbmm(offset, torch.from_numpy(numbers.colour), pixels)
    return mapped.clamp_(0, 255).view_as(x)


def _blur(x: Tensor, sigma: np.ndarray, window: int) -> Tensor:
    """Gaussian blur of the images whose sigma is not 0: [B, 3, H, W]."""
    rows = torch.from_numpy(np.flatnonzero(sigma))
    if len(rows) == 0:
        return x
    reach = window // 2
    distance = torch.arange(-reach, reach + 1, dtype=torch.float32)  # [window]
    kernel = torch.exp(-0.5 * (distance / torch.from_numpy(sigma)[rows, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # [3n, window]
    planes = functional.pad(x[rows], [reach] * 4, mode="reflect")
    planes = planes.reshape(1, -1, *planes.shape[2:])  # [1, 3n, H+2r, W+2r]
    planes = functional.conv2d(planes, kernel[:, None, None, :], groups=len(kernel))
    planes = functional.conv2d(planes, kernel[:, None, :, None], groups=len(kernel))
    return x.index_copy(0, rows, planes.view(len(rows), *x.shape[1:]))
