"""A rank's range of a tensor: how state is named that knows no engine and no number of ranks."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from scale_smog.distributed.process_group import rank, world_size


class Partition(NamedTuple):
    """What this rank holds of a tensor that knows no engine and no number of ranks."""

    values: Tensor  # any shape and layout; row by row they are a range of the flattened whole
    start: int  # of that range
    shape: torch.Size  # of the whole
    is_replicated: bool  # every rank holds the same

    @classmethod
    def whole(cls, values: Tensor) -> Self:
        """A tensor that every rank holds."""
        return cls(values, 0, values.shape, is_replicated=True)

    @classmethod
    def rows(cls, values: Tensor) -> Self:
        """This rank's rows [R, ...] of a tensor of as many rows on every rank, in rank order."""
        shape = torch.Size([len(values) * world_size(), *values.shape[1:]])
        return cls(values, rank() * values.numel(), shape, is_replicated=False)
