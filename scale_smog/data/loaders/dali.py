"""The DALI loaders, for the GPU and the CPU.

On a GPU, and for small views, the whole way from the file to the views is one DALI graph. For
large views on the CPU DALI decodes and torch, several times as fast there, makes the same views.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

# DALI's type stubs know neither its constants nor chains of operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from torch import Tensor

from scale_smog.data.augment import (
    MEAN,
    SOLARIZE_THRESHOLD,
    STD,
    View,
    blur_window,
)
from scale_smog.data.batch import Batch
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.held_outputs import held_until_read
from scale_smog.data.loaders.prefetch import prefetch
from scale_smog.data.pixels import empty_views, make_views, on_device
from scale_smog.errors import UserError

PREFETCH_BATCHES = 2
CUBIC = {"interp_type": types.INTERP_CUBIC, "antialias": True}


class DaliLoader:
    """Batches of `steps`, each image decoded once and augmented by a DALI graph.

    Args:
        source: what to load.
        steps: of the plan.
        threads: of the CPU part.
        device: where the batches go.
        on_gpu: run the graph on that GPU, else on the CPU.
    """

    def __init__(
        self,
        source: BatchSource,
        steps: range,
        threads: int,
        device: torch.device,
        on_gpu: bool,
    ):
        self._source = source
        self._steps = steps
        self._device = device
        self._pipeline = _view_pipeline(
            source.views,
            ExternalSource(source, steps.start),
            on_gpu=on_gpu,
            **pipeline_settings(source.batch_size, threads, device, on_gpu),
        )
        self._pipeline.build()

    def __iter__(self) -> Iterator[Batch]:
        labels = self._source.dataset.labels
        # The thread reads the files and samples the parameters that DALI asks for in `run`.
        run = partial(run_pipeline, self._pipeline)
        batches = held_until_read(prefetch(run, self._steps, PREFETCH_BATCHES), self._device)
        for step, outputs in zip(self._steps, batches, strict=True):
            views = [to_torch(output, self._device) for output in outputs]
            ids = self._source.ids(step)
            label = on_device(labels[ids], self._device)
            yield Batch.from_views(self._source.views, views, label, torch.from_numpy(ids))


def pipeline_settings(
    batch: int, threads: int, device: torch.device, on_gpu: bool
) -> dict[str, Any]:
    """What every pipeline here is built with."""
    return {
        "batch_size": batch,
        "num_threads": max(1, threads),
        "device_id": device.index if on_gpu else None,
        "prefetch_queue_depth": PREFETCH_BATCHES,
        "exec_dynamic": True,
    }


def run_pipeline(pipeline: Any, step: int) -> Any:
    """The outputs of a pipeline's next run.

    Raises:
        UserError: DALI fails, as on an image that it cannot decode.
    """
    try:
        return pipeline.run()
    except RuntimeError as error:
        last = step + PREFETCH_BATCHES
        raise UserError(f"DALI fails on an image of the steps {step} to {last}: {error}") from None


def to_torch(output: Any, device: torch.device) -> Tensor:
    """[B, 3, px, px] over DALI's own HWC memory: channels_last without a copy.

    DALI reuses the memory when the output is gone: see `held_until_read`.
    """
    view = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
    return view.to(device, non_blocking=True)


class DaliCpuLoader:
    """Batches of `steps`, decoded by DALI and made into views by torch, all on the CPU.

    Args:
        source: what to load.
        steps: of the plan.
        threads: that decode, and as many that make views.
        device: where the batches go.
    """

    def __init__(self, source: BatchSource, steps: range, threads: int, device: torch.device):
        self._source = source
        self._steps = steps
        self._threads = max(1, threads)
        self._device = device
        self._pipeline = _decoding_pipeline(
            lambda iteration: source.encoded(source.ids(steps.start + iteration)),
            **pipeline_settings(source.batch_size, threads, device, on_gpu=False),
        )
        self._pipeline.build()

    def __iter__(self) -> Iterator[Batch]:
        threads = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=[1])
        with threads:
            make = partial(self._make, threads=threads)
            yield from prefetch(make, self._steps, PREFETCH_BATCHES)

    def _make(self, step: int, threads: ThreadPoolExecutor) -> Batch:
        source = self._source
        ids, params = source.ids(step), source.augmentation_params(step)
        outputs = empty_views(source.views, len(ids), pinned=self._device.type == "cuda")
        (images,) = run_pipeline(self._pipeline, step)

        def make_views_of(row: int) -> None:
            image = torch.from_dlpack(images[row]).permute(2, 0, 1)  # [3, H, W]
            make_views(image, row, source.views, params, outputs)

        list(threads.map(make_views_of, range(len(ids))))
        views = [view.to(self._device, non_blocking=True) for view in outputs]
        label = on_device(source.dataset.labels[ids], self._device)
        return Batch.from_views(source.views, views, label, torch.from_numpy(ids))


@pipeline_def
def _decoding_pipeline(source: Callable[[int], list[np.ndarray]]) -> Any:
    files = fn.external_source(source=source, batch=True)
    return decode(files, on_gpu=False)


def decode(files: Any, on_gpu: bool) -> Any:
    """Images as they lie in their files, as sizes in the dataset are: EXIF turns none of them."""
    return fn.decoders.image(
        files,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
    )


class ExternalSource:
    """What `external_source` calls: encoded images, then the parameters that the graph reads."""

    def __init__(self, source: BatchSource, start: int):
        self.source = source
        self.start = start
        self._params = source.params_from(start)

    def __call__(self, iteration: int) -> list[list[np.ndarray] | np.ndarray]:
        step = self.start + iteration  # DALI asks for one after the other
        outputs: list[list[np.ndarray] | np.ndarray] = [self.source.encoded(self.source.ids(step))]
        for view, params in zip(self.source.views, next(self._params), strict=True):
            outputs += [params.box, *(getattr(params, name) for name in needed_params(view))]
        return outputs


def needed_params(view: View) -> list[str]:
    """Fields of AugmentationParams, the crop's box aside, that the graph of this view reads."""
    names = ["flip"]
    names += ["colour", "from_mean", "offset"] * view.has_colour
    names += ["sigma"] * view.has_blur
    names += ["solarize"] * view.has_solarize
    return names


@pipeline_def(enable_conditionals=True)
def _view_pipeline(views: Sequence[View], source: ExternalSource, on_gpu: bool) -> tuple[Any, ...]:
    names = [(i, name) for i, view in enumerate(views) for name in ["box", *needed_params(view)]]
    files, *nodes = fn.external_source(source=source, num_outputs=1 + len(names), batch=True)
    image = decode(files, on_gpu)
    outputs = []
    for i in range(len(views)):
        own = {names[k][1]: nodes[k] for k in range(len(names)) if names[k][0] == i}
        box = own["box"]
        window = fn.slice(image, box[:2], box[2:], axis_names="WH")
        outputs.append(augment_window(window, views[i], own))
    return tuple(outputs)


def augment_window(window: Any, view: View, params: dict[str, Any]) -> Any:
    """One view of a cropped window as graph nodes: HWC float32, normalised."""
    # torch and Pillow round to 8 bits between the two passes, so this does too.
    x = fn.resize(window, resize_x=view.px, mode="stretch", **CUBIC)
    x = fn.resize(x, resize_y=view.px, mode="stretch", **CUBIC)
    x = fn.cast(x, dtype=types.FLOAT)
    if view.has_colour:
        x = _recolour(x, params)
    if view.has_blur:
        x = _blur(x, params["sigma"], blur_window(view.px))
    if view.has_solarize:
        x = _solarize(x, params["solarize"])
    # Nothing before depends on left and right, so the flip can join this last, fused operator.
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.cast(params["flip"], dtype=types.INT32),
        mean=MEAN.tolist(),
        std=STD.tolist(),
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def _recolour(x: Any, params: dict[str, Any]) -> Any:
    """The affine colour map; the part that depends on the crop's mean stays on x's device."""
    mean = fn.reshape(fn.reductions.mean(x, axes=[0, 1]), shape=[1, 1, 3])
    offset = fn.coord_transform(mean, M=params["from_mean"], T=params["offset"])
    return math.clamp(fn.coord_transform(x, M=params["colour"]) + offset, 0.0, 255.0)


# The two functions below branch for each sample: DALI turns `if` into a split of the batch.


def _blur(x: Any, sigma: Any, window: int) -> Any:
    if sigma > 0:
        y = fn.gaussian_blur(x, sigma=sigma, window_size=window)
    else:
        y = x
    return y


def _solarize(x: Any, solarize: Any) -> Any:
    if solarize:
        above = x >= SOLARIZE_THRESHOLD
        y = above * (255.0 - x) + (x < SOLARIZE_THRESHOLD) * x
    else:
        y = x
    return y
