"""Tells torch.distributed.checkpoint which ranges of which flat tensors a rank writes and reads."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from scale_smog.distributed import Partition, call_on_main, rank

# One process without a process group is no reason for a warning.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class Writer(HuggingFaceStorageWriter):
    """Writes a safetensors file of this rank, which says what range each of its tensors is.

    Args:
        folder: of all ranks' files.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        # Tensors are in host memory: a copy ahead would only wait for the GPU, and so for steps.
        self.per_thread_copy_ahead = 0

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Numbers the file by the rank, who plans alone."""
        facts = {"shard_index": rank() + 1}
        return [dataclasses.replace(plan, storage_data=facts) for plan in plans]


class Reader(HuggingFaceStorageReader):
    """Reads ranges out of all safetensors files of a folder; there is no pickle to open.

    Which file holds what is in their headers: rank 0 reads those, not every rank all of them.

    Args:
        folder: of the files.
        group: ranks that read together; None for a caller who reads alone.
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup | None):
        super().__init__(str(folder))
        self._group = group

    def read_metadata(self) -> Metadata:
        if self._group is None:
            return super().read_metadata()
        return call_on_main(super().read_metadata, self._group)


def own_files(folder: Path, rank: int) -> list[Path]:
    """What `Writer` wrote on a rank."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*"))


class SavePlanner(DefaultSavePlanner):
    """Plans the partitions of a rank; the values to write are their flat tensors.

    Args:
        partitions: with flat values on the CPU.
    """

    def __init__(self, partitions: dict[str, Partition]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._partitions = partitions

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, x) for name, x in self._partitions.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Of this rank alone; its ranges are checked with all others' when they are written."""
        return all_plans, Metadata({})

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._partitions[index.fqn].values


class LoadPlanner(DefaultLoadPlanner):
    """Plans to fill the partitions' flat values, whoever wrote them in whatever ranges.

    Args:
        partitions: with flat values on the CPU.
    """

    def __init__(self, partitions: dict[str, Partition]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._partitions = partitions

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, partition in self._partitions.items():
            there = self.metadata.state_dict_metadata.get(name)
            if not isinstance(there, TensorStorageMetadata) or there.size != _flat(partition):
                raise ValueError(
                    f"the checkpoint holds no {name} of {partition.shape.numel()} values"
                )
            items += create_read_items_for_chunk_list(name, there, [_chunk(partition)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._partitions[index.fqn].values


def _write_item(name: str, partition: Partition) -> WriteItem:
    chunk, properties = _chunk(partition), TensorProperties.create_from_tensor(partition.values)
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, _flat(partition)),
    )


def _chunk(partition: Partition) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(
        torch.Size([partition.start]), torch.Size([partition.values.numel()])
    )


def _flat(partition: Partition) -> torch.Size:
    return torch.Size([partition.shape.numel()])
