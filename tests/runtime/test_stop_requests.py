"""A step sums up the ranks' requests to stop with its verdict: the check after it is free."""

import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from engine_runs import build_state, recipe_of
from ports import free_port
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.loop import train_step
from scale_smog.runtime import phases
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


MEETING = """
import sys, time
from torch.distributed import PrefixStore
from scale_smog import distributed
from scale_smog.runtime import preemption
preemption.MEETING_GRACE_S = 0.5
sys.modules["scale_smog.distributed.rendezvous"].LEAVING_S = float(sys.argv[1])
set_now = PrefixStore.set
def set_late(store, key, value):  # time enough to end between the word and the call
    time.sleep(0.5 * (key == "all"))
    set_now(store, key, value)
PrefixStore.set = set_late
with preemption.Preemption() as asked:
    print("waiting", flush=True)
    with distributed.process_group(meeting=asked.ends_process()):
        raise AssertionError("nobody came")
"""


def come_to_meet(rank: int, world_size: int, port: int, leaving_s: float) -> subprocess.Popen[str]:
    """A rank that waits for others, or is about to."""
    names, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = dict.fromkeys(names, str(rank)) | dict.fromkeys(sizes, str(world_size))
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", MEETING, str(leaving_s)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def stop_and_hear(ranks: list[subprocess.Popen[str]], signals: dict[int, int]) -> list[str]:
    """What ranks say that wait for others, when some of them get a signal."""
    for process in ranks:
        assert process.stdout and process.stdout.readline() == "waiting\n"
    for rank, number in signals.items():
        ranks[rank].send_signal(number)
    said = [process.communicate(timeout=300)[0] for process in ranks]  # they would wait for 600 s
    assert {process.returncode for process in ranks} == {0}
    assert said[0].startswith("stopped before all ranks had met")
    return said


def test_ranks_whose_mates_do_not_come_end_at_a_signal():
    # Rank 0 waits in Python, rank 1 in a call of torch's that hears no signal.
    ranks = [come_to_meet(rank, 2, free_port(), 3.0) for rank in (0, 1)]
    said = stop_and_hear(ranks, {0: signal.SIGTERM, 1: signal.SIGUSR1})
    assert not said[1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_stopped_while_ranks_meet_stops_those_that_wait(number):
    port = free_port()
    # The last does not come; a name server may be slow.
    ranks = [come_to_meet(rank, 3, port, 60.0) for rank in (0, 1)]
    store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    dist.PrefixStore("round-1", store).wait(["rank-0", "rank-1"])
    said = stop_and_hear(ranks, {number: signal.SIGTERM})
    assert not said[1] and (number == 0 or "as was rank 1 on " in said[0])


def test_what_a_step_has_noted_is_read_once():
    phases.note_stop_requests(2.0)
    assert phases.take_stop_requests() == 2.0
    assert phases.take_stop_requests() is None


@pytest.mark.parametrize("num_requests", [0.0, 3.0])
def test_requests_of_an_earlier_run_do_not_stop_the_next_one(num_requests):
    phases.note_stop_requests(num_requests)
    with Preemption():
        assert phases.take_stop_requests() is None
