"""Where a step's time goes: the methods that the loop calls are timed, and the loop knows nothing.

For the time of a profile these methods are replaced by ones that note when they begin and end;
afterwards the loop is as before, so not profiling costs nothing. On a GPU a timestamp is an event
in its stream: parts are measured where they run, and none waits for the device.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

PARTS = (
    "data_wait",
    "online_forward",
    "momentum_forward",
    "grouping",
    "backward",
    "communication",
    "optimizer",
    "ema",
    "kmeans",
    "other",
)
RANGE = "part: "  # begins the names of a part's ranges in traces


class TimedMethod(NamedTuple):
    """A method, or a function of a module, whose time belongs to a part."""

    owner: Any  # object or module
    name: str  # of its attribute
    part: str


class Timeline:
    """Notes when parts begin and end while steps run.

    A part that begins inside another interrupts it: every moment of a step belongs to one part,
    and what belongs to none is `other`. Parts therefore add up to the step.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._open: list[str] = []
        self._steps: list[list[tuple[Any, str]]] = []  # (timestamp, part from there on)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that belongs to one step."""
        self._steps.append([])
        with self.part("other"):
            yield
        self._note("")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around what belongs to a part; outside of steps it measures nothing."""
        if not self._steps:
            yield
            return
        self._open.append(name)
        self._note(name)
        try:
            with torch.profiler.record_function(RANGE + name), self._nvtx(name):
                yield
        finally:
            self._open.pop()
            if self._open:
                self._note(self._open[-1])

    def durations(self) -> list[dict[str, float]]:
        """Seconds of the parts of every step so far; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return [self._resolve(timestamps) for timestamps in self._steps]

    def _resolve(self, timestamps: Sequence[tuple[Any, str]]) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for (start, part), (end, _) in pairwise(timestamps):
            seconds[part] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return seconds

    def _note(self, part: str) -> None:
        if self._on_gpu:
            timestamp = torch.cuda.Event(enable_timing=True)
            timestamp.record()
        else:
            timestamp = time.perf_counter()
        self._steps[-1].append((timestamp, part))

    @contextmanager
    def _nvtx(self, name: str) -> Iterator[None]:
        if not self._on_gpu:
            yield
            return
        with torch.cuda.nvtx.range(RANGE + name):
            yield


@contextmanager
def timed(timeline: Timeline, methods: Iterable[TimedMethod]) -> Iterator[None]:
    """Times every call of the methods; on leaving, all are as they were."""
    with ExitStack() as undo:
        for owner, name, part in methods:
            own = name in vars(owner)
            function = getattr(owner, name)
            setattr(owner, name, _timing(timeline, part, function))
            if own:
                undo.callback(setattr, owner, name, function)
            else:
                undo.callback(delattr, owner, name)
        yield


def _timing(timeline: Timeline, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with timeline.part(part):
            return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class StepProfile:
    """Seconds of a typical step and its parts; they add up."""

    step_s: float
    parts: dict[str, float]  # all of PARTS
    percentiles_s: dict[str, float]  # p50, p95, p99 of the steps
    hidden_communication_s: float = 0.0

    @classmethod
    def of(cls, steps: Sequence[dict[str, float]]) -> "StepProfile":
        """Means over the middle half of the steps, by their duration.

        A mean, because medians of parts do not add up; of the middle half, because a step that
        another process interrupted says nothing.
        """
        totals = sorted((sum(step.values()), i) for i, step in enumerate(steps))
        quarter = len(totals) // 4
        middle = [steps[i] for _, i in totals[quarter : len(totals) - quarter]]
        parts = {name: statistics.fmean(step.get(name, 0.0) for step in middle) for name in PARTS}
        seconds = [total for total, _ in totals]
        percentiles = {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 95, 99)}
        return cls(sum(parts.values()), parts, percentiles)

    def with_kmeans(self, seconds: float) -> "StepProfile":
        """With a reset's k-means spread over the steps between resets, `seconds` for each."""
        parts = self.parts | {"kmeans": self.parts["kmeans"] + seconds}
        return StepProfile(
            self.step_s + seconds, parts, self.percentiles_s, self.hidden_communication_s
        )

    def with_communication(self, shares: "dict[str, Communication]") -> "StepProfile":
        """With the exposed communication taken out of the parts that waited for it."""
        parts, hidden = dict(self.parts), 0.0
        for name, share in shares.items():
            exposed = self.parts[name] * share.exposed
            parts[name] -= exposed
            parts["communication"] += exposed
            hidden += self.parts[name] * share.hidden
        return StepProfile(self.step_s, parts, self.percentiles_s, hidden)


class Communication(NamedTuple):
    """Communication during a part, as shares of the part's time."""

    exposed: float  # while nothing else was computed
    hidden: float  # behind computation
