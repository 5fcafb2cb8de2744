"""A rank that is slow by its own work is named, once; one that waits for a core is not."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.reporting import stragglers as module
from scale_smog.reporting.stragglers import Stragglers
from scale_smog.runtime.own_time import OwnTime

WINDOW_S, STEP_S, SLOW_RANK = 0.8, 0.1, 1


def work(kind: str, is_slow: bool) -> float:
    """A step of a rank; returns the seconds that it waited for data."""
    end_s = time.thread_time() + STEP_S
    if is_slow and kind == "computes":
        while time.thread_time() < end_s:
            pass
    elif is_slow:
        time.sleep(STEP_S)
    distributed.barrier()  # the others wait here
    return STEP_S if is_slow and kind == "waits for data" else 0.0


def name_stragglers(kind: str, num_reports: int) -> list[str | None]:
    module.WINDOW_S = WINDOW_S / 2
    slow = Stragglers(torch.device("cpu"))
    is_slow = distributed.rank() == SLOW_RANK and kind != "nothing"
    reports = []
    for _ in range(num_reports):
        steps = [work(kind, is_slow) for _ in range(round(WINDOW_S / STEP_S))]
        if kind == "nothing":  # all are slow
            time.sleep(WINDOW_S)
        reports.append(slow.found(sum(steps) / WINDOW_S))
    return reports


@pytest.mark.parametrize(
    ("kind", "words"),
    [("sleeps", "is busy"), ("computes", "is busy"), ("waits for data", "waits 100% of the time")],
)
def test_a_slow_rank_is_named_once_within_three_windows(kind, words):
    for reports in run_on_ranks(3, name_stragglers, kind, 5):
        (line,) = [report for report in reports if report]
        assert line in reports[:3] and reports[0] is None
        assert line.count("rank ") == 1 and "rank 1 on " in line and words in line


def test_ranks_that_are_all_slow_are_not_named():
    assert run_on_ranks(3, name_stragglers, "nothing", 3) == [[None] * 3] * 3


@pytest.fixture
def crowded_core() -> Iterator[None]:
    """This thread shares one core with five processes that never wait."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # and that of the processes that it starts
    spinning = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spinning) for _ in range(5)]
    yield
    for other in others:
        other.kill()
        other.wait()
    os.sched_setaffinity(0, cores)


def test_waiting_for_a_core_is_not_own_work(crowded_core):
    own_time, start_s, num_left = OwnTime(), time.monotonic(), 5_000_000
    while num_left > 0:
        num_left -= 1
    assert own_time.seconds() < (time.monotonic() - start_s) / 2  # about a sixth


def test_sleep_is_own_work():
    own_time = OwnTime()
    time.sleep(1.5)
    assert own_time.seconds() > 0.7


def test_one_rank_has_no_stragglers():
    assert Stragglers(torch.device("cpu")).found(0.9) is None
