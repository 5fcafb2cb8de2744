"""SIGTERM, SIGUSR1 or Ctrl-C on any rank: all ranks stop at the same pause point."""

import signal
import time
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from scale_smog import distributed
from scale_smog.runtime import phases

# A terminal sends Ctrl-C to ranks and launcher, and the launcher sends it on: within this time it
# is one; later, somebody who does not want to wait for the checkpoint.
SIGINT_GRACE_S = 5.0


class Preemption:
    """Turns a signal into an agreement, from its beginning to its end (`with`).

    The ranks' flags are summed in the background and looked at one pause point later, so that no
    step waits for the network.
    """

    def __enter__(self) -> Self:
        self.is_agreed = False
        self._is_asked = False
        self._interrupted_at: float | None = None
        self._sum = torch.zeros(1)
        self._work: dist.Work | None = None
        self._before = {number: signal.signal(number, self._ask) for number in phases.STOP_SIGNALS}
        # launcher/pretrain.py has them wait
        signal.pthread_sigmask(signal.SIG_UNBLOCK, phases.STOP_SIGNALS)
        phases.on_check.append(self._poll)
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the signals their former meaning back: what follows can be ended at once."""
        phases.on_check.remove(self._poll)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if number == signal.SIGINT:
            first = self._interrupted_at = self._interrupted_at or time.monotonic()
            if time.monotonic() - first > SIGINT_GRACE_S:
                raise KeyboardInterrupt

    def _poll(self) -> None:
        if self.is_agreed:  # what is saved or said on the way out is not stopped again
            return
        self.is_agreed = self._agreed()
        if self.is_agreed:
            raise phases.StopRequested

    def _agreed(self) -> bool:
        if distributed.world_size() == 1:
            return self._is_asked
        if self._work is not None:
            self._work.wait()
        if self._sum.item():
            return True
        self._sum = torch.tensor([float(self._is_asked)])
        self._work = dist.all_reduce(self._sum, async_op=True)
        return False
