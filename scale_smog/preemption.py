"""SIGTERM or SIGUSR1 on any rank: all ranks agree to stop after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from scale_smog import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Turns a signal into an agreement.

    The ranks' flags are summed in the background of a step and looked at one step later, so that
    no step waits for the network.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._sum = torch.zeros(1)
        self._work: dist.Work | None = None
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def close(self) -> None:
        """Gives the signals their former meaning back: what follows can be ended at once."""
        if self._work is not None:
            self._work.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def agreed(self) -> bool:
        """Whether all ranks stop now; every rank calls this once a step and hears the same."""
        if distributed.world_size() == 1:
            return self._is_asked
        if self._work is not None:
            self._work.wait()
        answer = bool(self._sum.item())
        self._sum = torch.tensor([float(self._is_asked)])
        self._work = dist.all_reduce(self._sum, async_op=True)
        return answer
