"""A second queue of a GPU, for work that needs nothing of what the first one does meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Runs work beside that of the current stream.

    Memory that the work takes is its stream's own. The current stream waits for the work at its
    end, and the next work for the current stream, so neither reuses what the other still reads.

    Args:
        device: a GPU; without one, or on a CPU, work runs where it is called.
    """

    def __init__(self, device: torch.device | None):
        is_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._start: torch.cuda.Event | None = None

    def may_start_now(self) -> None:
        """The next work needs what has been queued until now, and nothing that comes later."""
        if self._stream is not None:
            self._start = torch.cuda.Event()
            self._start.record()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the work."""
        if self._stream is None:
            yield
            return
        current, start = torch.cuda.current_stream(), self._start
        self._start = None
        if start is None:
            self._stream.wait_stream(current)
        else:
            self._stream.wait_event(start)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
