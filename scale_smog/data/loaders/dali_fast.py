"""DALI's own tar reader: no Python between the tars and the views, but not the plan's samples.

It gives up what needs random access by id. The `dali` loader keeps these promises, this one does
not:

- A rank reads its share of the tars in turn, mixed only within SHUFFLE_BUFFER samples; shares
  differ by a sample, and the larger one sets when a pass ends for all (the others repeat one).
- A resumed run begins a new pass with another order and other augmentation; so does another number
  of ranks. Between a start and a stop everything repeats to the bit on a CPU.
- Crops are drawn by DALI, and no checksum of an image is compared. `sample_id` is -1.

All other parameters are sampled as for the other loaders, with a place in the run as the id.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

# DALI's type stubs know neither its constants nor chains of operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor

from scale_smog.data.augment import ASPECT, NUM_CROP_TRIES, View
from scale_smog.data.batch import Batch
from scale_smog.data.images import IMAGE_EXTENSIONS
from scale_smog.data.labels import UNLABELLED, label_of
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.dali import (
    PREFETCH_BATCHES,
    augment_window,
    decode,
    needed_params,
    pipeline_settings,
    run_pipeline,
    to_torch,
)
from scale_smog.data.loaders.held_outputs import held_until_read
from scale_smog.data.loaders.prefetch import prefetch
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.data.tars import LABEL_EXTENSION

SHUFFLE_BUFFER = 1000  # encoded samples a rank keeps


class FastDaliLoader:
    """Batches of `steps` from the tars of a dataset, in DALI's order.

    Args:
        source: of its plan only the size of a batch counts.
        steps: how many batches; the first one's number chooses the order.
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
        assert isinstance(source.dataset, TarDataset), "this loader reads tars only"
        self._source = source
        self._steps = steps
        self._device = device
        self._pipeline = _reader_pipeline(
            source.dataset.tar_paths,
            source.views,
            _ParamsSource(source, steps.start),
            on_gpu,
            shard=(source.rank, source.world_size),
            order_seed=source.seed * 1_000_003 + steps.start,
            **pipeline_settings(source.batch_size, threads, device, on_gpu),
        )
        self._pipeline.build()

    def __iter__(self) -> Iterator[Batch]:
        run = partial(run_pipeline, self._pipeline)
        batches = held_until_read(prefetch(run, self._steps, PREFETCH_BATCHES), self._device)
        for labels, *outputs in batches:
            views = [to_torch(output, self._device) for output in outputs]
            label = _to_numbers(labels).to(self._device, non_blocking=True)
            unknown = torch.full((len(label),), -1)
            yield Batch.from_views(self._source.views, views, label, unknown)


class _ParamsSource:
    """What `external_source` calls: the augmentation parameters of a batch, its crops aside."""

    def __init__(self, source: BatchSource, start: int):
        self.source = source
        self.start = start

    def __call__(self, iteration: int) -> list[np.ndarray]:
        source, size = self.source, self.source.batch_size
        first = ((self.start + iteration) * source.world_size + source.rank) * size
        place = first + np.arange(size)
        ids, epochs = place % 2**32, place // 2**32
        any_size = np.ones(size, dtype=np.int64)
        outputs = []
        for view in source.views:
            params = view.sample(source.seed, ids, epochs, any_size, any_size)
            outputs += [getattr(params, name) for name in needed_params(view)]
        return outputs


def _to_numbers(labels: Any) -> Tensor:
    """[B] int64 of B labels in ASCII; without one, `UNLABELLED`."""
    texts = [bytes(np.array(label)).decode() for label in labels]
    return torch.tensor([label_of(text) if text else UNLABELLED for text in texts])


@pipeline_def(enable_conditionals=True)
def _reader_pipeline(
    tars: Sequence[str],
    views: Sequence[View],
    params: _ParamsSource,
    on_gpu: bool,
    shard: tuple[int, int],
    order_seed: int,
) -> tuple[Any, ...]:
    files, labels = fn.readers.webdataset(
        paths=list(tars),
        index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
        ext=[";".join(sorted(IMAGE_EXTENSIONS)), LABEL_EXTENSION],
        case_sensitive_extensions=False,
        missing_component_behavior="empty",  # a label; the index has no sample without an image
        shard_id=shard[0],
        num_shards=shard[1],
        stick_to_shard=True,
        pad_last_batch=True,
        random_shuffle=True,
        initial_fill=SHUFFLE_BUFFER,
        seed=order_seed,
    )
    image = decode(files, on_gpu)
    size = fn.peek_image_shape(files, adjust_orientation=False)
    names = [(i, name) for i, view in enumerate(views) for name in needed_params(view)]
    nodes = fn.external_source(source=params, num_outputs=len(names), batch=True)
    outputs = []
    for i, view in enumerate(views):
        own = {names[k][1]: nodes[k] for k in range(len(names)) if names[k][0] == i}
        start, extent = fn.random_crop_generator(
            size,
            random_area=list(view.scale),
            random_aspect_ratio=list(ASPECT),
            num_attempts=NUM_CROP_TRIES,
            seed=order_seed + shard[0] * len(views) + i,  # of a view of a rank
        )
        window = fn.slice(image, start, extent, axis_names="HW")
        outputs.append(augment_window(window, view, own))
    return (labels, *outputs)
