"""Keeps buffers that another library will reuse until torch has read them for the last time.

torch reads a buffer after the host has gone on, and the library frees it in the order of its own
stream, which nothing orders behind torch's. A copy does not help: it is read as late.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch

MOST_HELD = 4  # batches: beyond that the host waits for the GPU

Outputs = TypeVar("Outputs")


class _Event(Protocol):
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


def held_until_read(outputs: Iterable[Outputs], device: torch.device) -> Iterator[Outputs]:
    """Yields each of `outputs` and holds on to it until what reads it has run.

    Everything that reads an output must have been queued on the current stream when the next one
    is asked for.

    Args:
        outputs: of the library, one for each batch.
        device: that reads them; on a CPU what is queued has run.
    """
    held: deque[tuple[_Event, Any]] = deque()
    is_gpu = device.type == "cuda"
    try:
        for output in outputs:
            yield output
            if is_gpu:
                held.append((_event_after_queued_work(), output))
            while held and (len(held) > MOST_HELD or held[0][0].query()):
                held[0][0].synchronize()
                held.popleft()  # only now may the library have it
    finally:
        if is_gpu:
            _event_after_queued_work().synchronize()


def _event_after_queued_work() -> _Event:
    event = torch.cuda.Event()
    event.record()
    return event
