"""The torchvision loader: same plan, same views as DALI's, on the CPU with worker processes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.pixels import empty_views, make_views, one_thread
from scale_smog.data.workers import exit_with_parent, start_forkserver
from scale_smog.errors import UserError
from scale_smog.runtime.preemption import stop_signals_blocked

SHARED_MEMORY = Path("/dev/shm")
BATCHES_AHEAD = 3  # of a worker: two that wait, and the one on its way
MIB = 2**20
T = TypeVar("T")


class TorchLoader:
    """Batches of `steps`, made by `workers` processes (0: by this one).

    Args:
        source: what to load.
        steps: of the plan.
        workers: processes; each makes whole batches.
        device: where the batches go.

    Raises:
        UserError: the workers' batches do not fit into /dev/shm.
    """

    def __init__(self, source: BatchSource, steps: range, workers: int, device: torch.device):
        on_gpu = device.type == "cuda"
        _require_shared_memory(source, min(workers, len(steps)))
        self._source = source
        self._device = device
        self._batches = DataLoader(
            _PlannedBatches(source),
            batch_size=None,  # an item is a whole batch
            sampler=steps,
            num_workers=workers,
            pin_memory=on_gpu,
            # Forking a process that already talks to a GPU or to other ranks is unsafe.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=exit_with_parent,
        )

    def __iter__(self) -> Iterator[Batch]:
        with stop_signals_blocked():
            if self._batches.num_workers:
                # Which imports what workers need, once for all; torchvision takes the longest.
                start_forkserver(__name__, "torchvision")
            batches = iter(self._batches)
        for views, label, sample_id in with_plain_errors(batches):
            views = [self._to_device(view) for view in views]
            label = label.to(self._device, non_blocking=True)
            yield Batch.from_views(self._source.views, views, label, sample_id)

    def _to_device(self, view: Tensor) -> Tensor:
        view = view.to(self._device, non_blocking=True)
        return view.contiguous(memory_format=torch.channels_last)


def with_plain_errors(batches: Iterator[T]) -> Iterator[T]:
    """Batches of a DataLoader, which puts a worker's traceback before what it has to say.

    Raises:
        UserError: a worker did; with its message only.
    """
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None


def _require_shared_memory(source: BatchSource, workers: int) -> None:
    """Batches come through /dev/shm; a worker that finds it full leaves the others waiting."""
    values = sum(3 * view.px**2 for view in source.views)
    needed = 4 * values * source.batch_size * BATCHES_AHEAD * workers
    if workers == 0 or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free // distributed.num_sharing_ranks()
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / MIB:.0f} MiB for a rank, and {workers} workers need "
            f"{needed / MIB:.0f} for their batches: start the container with more (docker run "
            "--shm-size=16g or --ipc=host), or take fewer data.workers, or 0"
        )


class _PlannedBatches(Dataset):
    """Item `step` is this rank's batch of that step."""

    def __init__(self, source: BatchSource):
        self.source = source

    def __getitem__(self, step: int) -> tuple[list[Tensor], Tensor, Tensor]:
        source = self.source
        ids, params = source.ids(step), source.augmentation_params(step)
        outputs = empty_views(source.views, len(ids))
        with one_thread():
            for row, encoded in enumerate(source.encoded(ids)):
                image = decode_sample(source.dataset, int(ids[row]), encoded)
                make_views(image, row, source.views, params, outputs)
        label = torch.from_numpy(source.dataset.labels[ids])
        return outputs, label, torch.from_numpy(ids)


def decode_sample(dataset: Images, sample_id: int, encoded: np.ndarray) -> Tensor:
    """`decode` of a sample's file.

    Raises:
        UserError: torchvision cannot decode it; names the sample.
    """
    try:
        return decode(encoded)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{dataset.name_of(sample_id)} (id {sample_id}) cannot be decoded: {reason}"
        ) from None


def decode(encoded: np.ndarray) -> Tensor:
    """[3, H, W] uint8 of an encoded image [bytes] uint8."""
    from torchvision.io import ImageReadMode, decode_image  # half a second, and no other loader's

    return decode_image(torch.from_numpy(encoded.copy()), mode=ImageReadMode.RGB)
