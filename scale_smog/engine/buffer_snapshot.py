"""Undoes what a forward pass does to the nets: it moves the running statistics."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """Copies of the buffers of nets, one for all steps.

    Args:
        nets: whose buffers keep their storage.
    """

    def __init__(self, nets: Iterable[nn.Module]):
        buffers = [buffer for net in nets for buffer in net.buffers()]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}  # one kernel copies tensors of one type
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [(x, [b.clone() for b in x]) for x in by_dtype.values()]

    @torch.no_grad()
    def take(self) -> None:
        """Copies them, before a forward pass."""
        for buffers, copies in self._pairs:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Gives them the values of the last `take`."""
        for buffers, copies in self._pairs:
            torch._foreach_copy_(buffers, copies)
