"""A forward pass without gradient, replayed by the GPU as one launch (a CUDA graph)."""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_WARM_UPS = 3  # calls in which libraries allocate what they keep, before one is captured


class GraphedForward:
    """Calls a net as it is, then captures it, then replays what was captured.

    The net must do the same with every input, all of one shape: its weights and buffers are read
    and written where they are. Runs on a stream that is not the default one.

    Args:
        net: maps a view [B, 3, H, W] to [B, D]; collectives in it are captured too.
    """

    def __init__(self, net: Callable[[Tensor], Tensor]):
        self._net = net
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, view: Tensor) -> Tensor:
        """As the net."""
        self._num_calls += 1
        if self._num_calls <= NUM_WARM_UPS:
            return self._net(view)
        if self._graph is None:
            self._graph = self._capture(view)
        self._view.copy_(view)
        self._graph.replay()
        return self._output.clone()  # the next replay writes there again

    def _capture(self, view: Tensor) -> torch.cuda.CUDAGraph:
        self._view = view.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data and watch NCCL, may go on as they like meanwhile.
        stream, mode = torch.cuda.current_stream(), "thread_local"
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            self._output = self._net(self._view)
        return graph
