"""Where a step's time goes: parts add up, and a profile leaves the loop as it was."""

import time
from collections.abc import Callable

import pytest
import torch

from scale_smog.profiling.step_profile import (
    PARTS,
    Communication,
    StepProfile,
    TimedMethod,
    Timeline,
    timed,
)
from scale_smog.profiling.traces import intersection, length, minus, union

CPU = torch.device("cpu")


class Worker:
    """Two calls, of which one makes the other; each takes exactly as long as it says."""

    def __init__(self, take: Callable[[float], None] = lambda seconds: None) -> None:
        self.take = take

    def outer(self) -> None:
        self.take(0.01)
        self.inner()

    def inner(self) -> None:
        self.take(0.02)


def test_a_part_inside_another_takes_its_own_time_and_all_add_up_to_the_step(monkeypatch):
    # A clock of the test's own: a busy machine adds milliseconds anywhere.
    now = [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    worker, timeline = Worker(take), Timeline(CPU)
    with timed(
        timeline, [TimedMethod(worker, "outer", "ema"), TimedMethod(worker, "inner", "backward")]
    ):
        with timeline.step():
            worker.outer()
            take(0.005)
    (step,) = timeline.durations()
    assert step["ema"] == pytest.approx(0.01)
    assert step["backward"] == pytest.approx(0.02)
    assert step["other"] == pytest.approx(0.005)
    assert sum(step.values()) == pytest.approx(0.035)


def test_after_a_profile_everything_is_as_before():
    worker = Worker()
    kept = worker.inner = lambda: None  # an attribute of the object itself
    with timed(Timeline(CPU), [TimedMethod(worker, n, "ema") for n in ("outer", "inner")]):
        assert worker.inner is not kept and "outer" in vars(worker)
    assert worker.inner is kept and "outer" not in vars(worker)


def test_a_step_that_was_interrupted_does_not_count():
    calm = {"ema": 1.0, "backward": 2.0}
    profile = StepProfile.of([calm] * 6 + [{"ema": 90.0, "backward": 2.0}] + [calm] * 5)
    assert profile.step_s == 3.0 and profile.parts["ema"] == 1.0
    assert set(profile.parts) == set(PARTS)
    assert profile.percentiles_s["p50"] == 3.0 and profile.percentiles_s["p99"] > 50


def test_exposed_communication_moves_out_of_the_part_that_waited():
    before = StepProfile.of([{"backward": 4.0, "optimizer": 1.0}])
    after = before.with_communication({"backward": Communication(exposed=0.25, hidden=0.5)})
    assert after.parts["backward"] == 3.0 and after.parts["communication"] == 1.0
    assert after.hidden_communication_s == 2.0
    assert sum(after.parts.values()) == after.step_s == before.step_s


def test_spans_of_time_are_joined_cut_and_measured():
    a = union([(5, 6), (0, 2), (1, 3)])
    assert a == [(0, 3), (5, 6)]
    b = [(2, 5.5)]
    assert intersection(a, b) == [(2, 3), (5, 5.5)] and minus(a, b) == [(0, 2), (5.5, 6)]
    assert length(a) == 4
