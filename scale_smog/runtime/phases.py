"""What this rank is doing, by name, and the places at which long work may be stopped.

Long work does not know who listens: `preemption` stops it, the `watchdog` has a timeout for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

START, DATA, STEP, KMEANS, EVALUATION, SAVING = (
    "start",
    "data",
    "step",
    "k-means",
    "evaluation",
    "saving",
)


class StopRequested(Exception):
    """All ranks have agreed to stop at this check."""


on_enter: list[Callable[[str], None]] = []
on_check: list[Callable[[], None]] = []
is_stop_requested = False  # by a signal to this rank
_num_stop_requests: float | None = None
_current = START


def current() -> str:
    """The phase that this rank is in."""
    return _current


def enter(phase: str) -> None:
    """This rank begins a phase; every rank enters the same ones in the same order."""
    global _current
    _current = phase
    for listener in on_enter:
        listener(phase)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """A phase within another one."""
    before = _current
    enter(phase)
    try:
        yield
    finally:
        enter(before)


def note_stop_requests(num: float) -> None:
    """A step has summed up the ranks' `is_stop_requested`: the next check needs no collective."""
    global _num_stop_requests
    _num_stop_requests = num


def take_stop_requests() -> float | None:
    """What the step before this check has noted; None: nothing."""
    global _num_stop_requests
    num, _num_stop_requests = _num_stop_requests, None
    return num


def check_for_stop() -> None:
    """Every rank calls this at the same places, now and then, where nothing is half done.

    Raises:
        StopRequested: on all ranks alike.
    """
    for listener in on_check:
        listener()


def stoppable(function: Callable[[T], U]) -> Callable[[T], U]:
    """`function`, which a stop request ends between two calls, on all ranks alike."""

    def call_or_stop(argument: T) -> U:
        check_for_stop()
        return function(argument)

    return call_or_stop
