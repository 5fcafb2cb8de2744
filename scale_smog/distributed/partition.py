"""A rank's part of a tensor, described so that state knows no engine and no number of ranks."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from scale_smog.distributed.process_group import rank, world_size


class Partition(NamedTuple):
    """What this rank holds of a global tensor: a range of its flattened elements, or all of it."""

    values: Tensor  # any shape and layout; in row-major order they are the range
    start: int  # of the range in the flattened tensor
    shape: torch.Size  # of the global tensor
    is_replicated: bool  # every rank holds the same

    @classmethod
    def replicated(cls, values: Tensor) -> Self:
        """A tensor that every rank holds."""
        return cls(values, 0, values.shape, is_replicated=True)

    @classmethod
    def from_rows(cls, values: Tensor) -> Self:
        """This rank's rows [R, ...] of a tensor with as many rows on every rank, in rank order."""
        shape = torch.Size([len(values) * world_size(), *values.shape[1:]])
        return cls(values, rank() * values.numel(), shape, is_replicated=False)

    @property
    def num_bytes(self) -> int:
        """Of the values that this rank holds."""
        return self.values.numel() * self.values.element_size()
