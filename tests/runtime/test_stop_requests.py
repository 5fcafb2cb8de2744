"""A step sums up the ranks' requests to stop with its verdict: the check after it is free."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from engine_runs import build_state, recipe_of
from ports import free_port
from ranks import run_on_ranks, start_forkserver

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.loop import train_step
from scale_smog.runtime import phases, preemption
from scale_smog.runtime.preemption import Preemption
from scale_smog.throughput import FIXED_VALUES


def stop_after_a_step(folder: str, rank_that_asks: int) -> list[bool]:
    """Whether the checks before and after the request stop this rank."""
    recipe = recipe_of(folder)
    state = build_state(recipe)
    batch = recipe.data.global_batch // distributed.world_size()
    views = torch.randn(2, batch, 3, 12, 12).unbind()
    label = torch.zeros(batch, dtype=torch.int64)
    stopped = []
    with Preemption():
        for is_asked in (False, True):
            phases.is_stop_requested = is_asked and distributed.rank() == rank_that_asks
            train_step(state, Batch(list(views), [], label, label), FIXED_VALUES)
            with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")):
                try:
                    phases.check_for_stop()
                    stopped.append(False)
                except phases.StopRequested:
                    stopped.append(True)
        phases.is_stop_requested = False
    return stopped


def test_all_ranks_stop_after_the_step_in_which_one_was_asked_to(tmp_path):
    assert run_on_ranks(2, stop_after_a_step, str(tmp_path), 1) == [[False, True]] * 2


def wait_for_the_others(console: Path, environment: dict[str, str], leaving_s: float) -> None:
    """A rank's whole process: it waits, or is about to, for ranks that do not come."""
    os.dup2(os.open(console, os.O_WRONLY | os.O_CREAT), 1)
    # The server that it was forked from ignores what a launcher sends.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ |= environment
    preemption.MEETING_GRACE_S = 0.5
    sys.modules["scale_smog.distributed.rendezvous"].LEAVING_S = leaving_s
    set_now = dist.PrefixStore.set

    def set_late(store: dist.Store, key: str, value: str) -> None:
        time.sleep(0.5 * (key == "all"))  # time enough to end between the word and the call
        set_now(store, key, value)

    dist.PrefixStore.set = set_late
    with Preemption() as asked:
        print("waiting", flush=True)
        with distributed.process_group(meeting=asked.ends_process()):
            raise AssertionError("nobody came")


def come_to_meet(
    folder: Path, rank: int, world_size: int, port: int, leaving_s: float
) -> BaseProcess:
    names, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = dict.fromkeys(names, str(rank)) | dict.fromkeys(sizes, str(world_size))
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_forkserver()
    process = multiprocessing.get_context("forkserver").Process(
        target=wait_for_the_others,
        args=(folder / f"rank-{rank}.log", environment, leaving_s),
        daemon=True,
    )
    process.start()
    return process


def stop_and_hear(folder: Path, ranks: list[BaseProcess], signals: dict[int, int]) -> list[str]:
    """What ranks say that wait for others, when some of them get a signal."""
    for rank, process in enumerate(ranks):
        while not said_by(folder, rank):
            assert process.is_alive()
            time.sleep(0.02)
    for rank, number in signals.items():
        pid = ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)
    for process in ranks:
        process.join(300)  # they would wait for 600 s
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * len(ranks)
    said = [said_by(folder, rank).removeprefix("waiting\n") for rank in range(len(ranks))]
    assert said[0].startswith("stopped before all ranks had met")
    return said


def said_by(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    return path.read_text() if path.exists() else ""


def test_ranks_whose_mates_do_not_come_end_at_a_signal(tmp_path):
    # Rank 0 waits in Python, rank 1 in a call of torch's that hears no signal.
    ranks = [come_to_meet(tmp_path, rank, 2, free_port(), 3.0) for rank in (0, 1)]
    said = stop_and_hear(tmp_path, ranks, {0: signal.SIGTERM, 1: signal.SIGUSR1})
    assert not said[1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_stopped_while_ranks_meet_stops_those_that_wait(tmp_path, number):
    port = free_port()
    # The last does not come; a name server may be slow.
    ranks = [come_to_meet(tmp_path, rank, 3, port, 60.0) for rank in (0, 1)]
    store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    dist.PrefixStore("round-1", store).wait(["rank-0", "rank-1"])
    said = stop_and_hear(tmp_path, ranks, {number: signal.SIGTERM})
    assert not said[1] and (number == 0 or "as was rank 1 on " in said[0])


@pytest.mark.parametrize(("rank", "num_said"), [("0", 1), ("1", 0)])
def test_rank_0_says_at_once_that_it_has_heard_a_signal(monkeypatch, capfd, rank, num_said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(phases, "is_stop_requested", False)  # and again after the test
    with Preemption():
        for _ in range(2):  # as from a terminal and its launcher
            os.kill(os.getpid(), signal.SIGINT)
    assert phases.is_stop_requested
    assert capfd.readouterr().err.count("stopping as soon as") == num_said


def test_what_a_step_has_noted_is_read_once():
    phases.note_stop_requests(2.0)
    assert phases.take_stop_requests() == 2.0
    assert phases.take_stop_requests() is None


@pytest.mark.parametrize("num_requests", [0.0, 3.0])
def test_requests_of_an_earlier_run_do_not_stop_the_next_one(num_requests):
    phases.note_stop_requests(num_requests)
    with Preemption():
        assert phases.take_stop_requests() is None
