"""Reads checkpoints: partitions for a rank of a run, or whole tensors for anyone."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from scale_smog.checkpoint.manifest import DamagedCheckpoint, read_manifest
from scale_smog.checkpoint.planner import LoadPlanner, Reader
from scale_smog.distributed import Partition, call_on_all_ranks
from scale_smog.errors import UserError


def load(folder: Path, part: str = "*") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors (of one part, such as "online", or of all; on the CPU) and the run's facts.

    Not a collective: every caller reads all. It does not hash; `find_damage` does.

    Raises:
        UserError: there is no manifest, or a damaged one.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as error:
        raise UserError(str(error)) from None
    facts = {"step": manifest.step, **manifest.facts}
    partitions = {
        name: Partition.replicated(torch.empty(shape, dtype=_dtype(dtype, folder)))
        for name, (shape, dtype) in manifest.tensors.items()
        if fnmatch(name, f"{part}.*")
    }
    return read(folder, partitions, None), facts


def read(
    folder: Path, partitions: dict[str, Partition], group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Values for the partitions, each in its shape; a collective of a group.

    Raises:
        UserError: on all ranks of the group; the files do not hold such partitions.
    """
    flat = {
        name: partition._replace(
            values=torch.empty(partition.values.numel(), dtype=partition.values.dtype)
        )
        for name, partition in partitions.items()
    }
    wanted = {name: partition for name, partition in flat.items() if partition.values.numel()}

    def fill() -> None:
        try:
            # Each rank plans for itself: rank 0 would take 40 ms a rank to hear of it and answer.
            dcp.load(
                {name: partition.values for name, partition in wanted.items()},
                storage_reader=Reader(folder, group),
                planner=LoadPlanner(wanted),
                no_dist=True,
            )
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise UserError(f"{folder} does not hold the state of this run: {cause}") from None

    if group is None:
        fill()
    else:
        call_on_all_ranks(fill, group)
    return {
        name: partition.values.view(partitions[name].values.shape)
        for name, partition in flat.items()
    }


def _dtype(name: str, folder: Path) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{folder}: '{name}' is no type of tensor")
    return dtype
