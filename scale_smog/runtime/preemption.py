"""SIGTERM, SIGUSR1 or Ctrl-C on any rank: all ranks stop at the same `phases.check_for_stop`."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from scale_smog import distributed
from scale_smog.runtime import phases

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # end a run with a checkpoint
# A terminal sends Ctrl-C to ranks and launcher, and the launcher sends it on: within this time it
# is one; later, somebody who does not want to wait for the checkpoint.
SIGINT_GRACE_S = 5.0
HEARD = b"\nstopping as soon as what is under way can be saved; Ctrl-C again, later, ends at once\n"
# For ranks that have nearly met, and then stop with a checkpoint; launchers kill after 30 s.
MEETING_GRACE_S = 15.0


class Preemption:
    """Turns a signal to one rank into a stop of all, from its beginning to its end (`with`).

    After a step, which has summed up the ranks' requests with its own verdict, a check costs
    nothing. Elsewhere an asynchronous all-reduce sums them, and is read at the next check.
    """

    def __enter__(self) -> Self:
        self.is_agreed = False
        phases.is_stop_requested = False
        phases.take_stop_requests()  # of a run before this one
        self._interrupted_at: float | None = None
        self._sum = torch.zeros(1)
        self._work: dist.Work | None = None
        self._before = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # launcher/pretrain.py blocks them
        phases.on_check.append(self._check)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the signals' handlers: what follows can be ended at once."""
        phases.on_check.remove(self._check)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def ends_process(self) -> Iterator[None]:
        """Within, a signal ends this process, unless the block soon ends; nothing is to be saved.

        For calls that hear no signals for minutes, such as those in which the ranks meet.
        """
        signals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        before, is_over = signal.set_wakeup_fd(wakeup.fileno()), threading.Event()

        def listen() -> None:
            is_asked = phases.is_stop_requested
            while not is_asked and (number := signals.recv(1)):
                is_asked = number[0] in STOP_SIGNALS
            if is_asked and not is_over.wait(MEETING_GRACE_S):
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    said = "stopped before all ranks had met; the same command resumes from there"
                    print(f"{said} ({socket.gethostname()})", flush=True)
                distributed.leave_rendezvous()
                os._exit(0)
            signals.close()

        threading.Thread(target=listen, daemon=True).start()
        try:
            yield
        finally:
            is_over.set()
            signal.set_wakeup_fd(before)
            wakeup.close()  # ends the thread

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not phases.is_stop_requested and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, HEARD)  # not print, which the signal may have interrupted
        phases.is_stop_requested = True
        if number == signal.SIGINT:
            first = self._interrupted_at = self._interrupted_at or time.monotonic()
            if time.monotonic() - first > SIGINT_GRACE_S:
                raise KeyboardInterrupt

    def _check(self) -> None:
        if self.is_agreed:  # what is saved or said on the way out is not stopped again
            return
        self.is_agreed = self._agree()
        if self.is_agreed:
            raise phases.StopRequested

    def _agree(self) -> bool:
        if distributed.world_size() == 1:
            return phases.is_stop_requested
        if (num_requests := phases.take_stop_requests()) is not None:
            return num_requests > 0
        if self._work is not None:
            self._work.wait()
        if self._sum.item():
            return True
        self._sum = torch.tensor([float(phases.is_stop_requested)])
        self._work = dist.all_reduce(self._sum, async_op=True)
        return False


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes started within do not receive the signals that stop a run.

    Launchers and terminals send those to a rank's children too, and the rank still needs them for
    the step that it saves.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # is inherited
    resource_tracker.ensure_running()  # it unblocks signals when it starts: hence once more
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
