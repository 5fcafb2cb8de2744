"""Ranks of one machine start no more decoding processes than it has cores and memory for."""

import os

import psutil
import pytest

from scale_smog.data import workers
from scale_smog.data.workers import run_in_processes, workers_of_rank
from scale_smog.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("wanted", "num_ranks", "cores", "free_gib", "expected"),
    [
        (8, 1, 16, 100, 8),
        (8, 1, 2, 100, 2),  # no more than cores
        (8, 8, 64, 500, 8),
        (8, 8, 16, 500, 2),
        (8, 64, 2, 500, 0),  # a rank decodes by itself
        (8, 8, 64, 20, 2),  # of little memory
        (0, 1, 64, 500, 0),
    ],
)
def test_a_rank_starts_its_share(monkeypatch, wanted, num_ranks, cores, free_gib, expected):
    free = psutil.virtual_memory()._replace(available=free_gib * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert workers.num_usable_cores() == cores
    assert workers_of_rank(wanted, num_ranks) == expected


@pytest.mark.parametrize("advice", ["", " with fewer workers, it continues"])
def test_a_killed_worker_is_named_with_the_advice_of_its_command_only(advice):
    with pytest.raises(UserError) as found:
        list(run_in_processes(os._exit, [1, 1], 2, advice=advice))
    said = "a worker process was killed, perhaps for lack of memory; run the same command again"
    assert str(found.value) == said + advice
