"""The loader of small sets: decoded once into the device's memory, all views made there in batches.

Images of 32 px are too many for any decoder: a GPU wants 10,000 views of them a second. Here a view
costs a few products of matrices.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from scale_smog.data.augment import AugmentationParams
from scale_smog.data.batch import Batch
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.torch import decode_sample
from scale_smog.data.pixels import augment_crops, on_device
from scale_smog.data.workers import num_usable_cores
from scale_smog.errors import UserError

LARGEST_SHARE = 0.5  # of the device's free memory, or of 16 GiB on a CPU
_CPU_BYTES = 16 * 2**30


class MemoryLoader:
    """Batches of `steps` from decoded images on `device`.

    The same views as the other loaders', within the tolerances of their comparison.

    Args:
        source: what to load.
        steps: of the plan.
        device: where the images lie and the views are made; a CPU will do.

    Raises:
        UserError: the decoded images would take more than half of the device's free memory, or one
            cannot be decoded.
    """

    def __init__(self, source: BatchSource, steps: range, device: torch.device):
        self._source = source
        self._steps = steps
        self._device = device
        self._images = _decode_all(source, device)

    def __iter__(self) -> Iterator[Batch]:
        source = self._source
        for step, drawn in zip(self._steps, source.params_from(self._steps.start), strict=False):
            ids = source.ids(step)
            images = self._images[on_device(ids, self._device)].float()  # [B, 3, H, W]
            views = []
            for view, params in zip(source.views, drawn, strict=True):
                cropped = crop_batch(images, params, view.px)
                made = augment_crops(cropped, view, params)
                views.append(made.contiguous(memory_format=torch.channels_last))
            label = on_device(source.dataset.labels[ids], self._device)
            yield Batch.from_views(source.views, views, label, torch.from_numpy(ids))


def _decode_all(source: BatchSource, device: torch.device) -> Tensor:
    """All images [N, 3, H, W] uint8, with zeros up to the largest height and width."""
    dataset = source.dataset
    ids = np.arange(dataset.num_samples)
    shape = (len(ids), 3, int(dataset.heights.max()), int(dataset.widths.max()))
    free = _CPU_BYTES
    if device.type == "cuda":  # what torch keeps of tensors that are gone is free too
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved - used
    if np.prod(shape, dtype=np.float64) > LARGEST_SHARE * free:
        raise UserError(
            f"data.loader=memory keeps all images decoded: "
            f"{np.prod(shape, dtype=np.float64) / 2**30:.1f} GiB, the device has "
            f"{free / 2**30:.1f} GiB free: take data.loader=dali"
        )
    images = torch.zeros(shape, dtype=torch.uint8)

    def decode_into(row: int) -> None:
        (encoded,) = source.encoded(ids[row : row + 1])
        image = decode_sample(dataset, row, encoded)
        images[row, :, : image.shape[1], : image.shape[2]] = image

    with ThreadPoolExecutor(num_usable_cores()) as threads:
        list(threads.map(decode_into, range(len(ids))))
    return images.to(device)


def crop_batch(images: Tensor, params: AugmentationParams, px: int) -> Tensor:
    """Boxes of a batch, resized and mirrored, in whole grey levels.

    Resizing is linear and separable: rows @ image @ columns, with a matrix of weights each.

    Args:
        images: [B, 3, H, W] float32, 0 to 255; what lies beyond an image's size is never read.
        params: boxes and flips of these images.
        px: side of the result.

    Returns:
        [B, 3, px, px] float32.
    """
    left, top, width, height = on_device(params.box, images.device).float().T  # [B]
    rows = _cubic_weights(top, height, px, images.shape[-2])[:, None]  # [B, 1, px, H]
    columns = _cubic_weights(left, width, px, images.shape[-1])  # [B, px, W]
    flip = on_device(params.flip, images.device)[:, None, None]
    columns = torch.where(flip, columns.flip(1), columns)[:, None]  # [B, 1, px, W]
    narrow = _whole_levels(images @ columns.mT)  # torch and Pillow round between the passes too
    return _whole_levels(rows @ narrow)


def _whole_levels(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)


def _cubic_weights(start: Tensor, length: Tensor, px: int, size: int) -> Tensor:
    """Bicubic weights with antialiasing, as Pillow has them: [B, px, size].

    Args:
        start: first pixel of each range [B].
        length: of each range [B], px.
        px: number of results.
        size: of the whole side, px.
    """
    scale = (length / px)[:, None, None]  # [B, 1, 1], pixels of a result
    width = scale.clamp(min=1)  # the kernel grows where many pixels make one
    result = torch.arange(px, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(size, device=start.device)[None, None] + 0.5
    first, last = start[:, None, None], (start + length)[:, None, None]
    distance = ((pixel - first - result * scale) / width).abs()  # [B, px, size]
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = torch.where((pixel > first) & (pixel < last), weights, 0)  # not beyond the box
    return weights / weights.sum(2, keepdim=True)
