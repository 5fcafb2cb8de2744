"""A short version of many_ranks.py: six ranks on two pretended nodes; and what it leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "many_ranks.py"
RANKS_WITH_WORKERS = """
import multiprocessing, sys, time
from pathlib import Path
from forked_ranks import ForkedRanks

def work(rank):
    context = multiprocessing.get_context("forkserver")
    context.Process(target=time.sleep, args=(600,)).start()
    print("a worker has started", flush=True)
    time.sleep(600)

job = ForkedRanks(Path(sys.argv[1]), 2, 2, work)
job.start()
while job.said().count("a worker has started") < 2:
    time.sleep(0.05)
print(job.pids[0], flush=True)
job.wait(600)
"""


def test_two_nodes_of_three_ranks_train_to_their_end_and_evaluate():
    command = [sys.executable, str(PROGRAM), "--ranks", "6", "--per-node", "3"]
    command += ["--engine", "hsdp"]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ended.stdout.splitlines()[-1]
    assert last == "6 ranks, hsdp: train: all reached their end", ended.stdout + ended.stderr
    assert ended.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_or_worker_outlives_the_program(tmp_path, number):
    program = tmp_path / "ranks_with_workers.py"
    program.write_text(RANKS_WITH_WORKERS)
    command = [sys.executable, str(program), str(tmp_path / "consoles")]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = os.getpgid(int(parent.stdout.readline()))
    assert len(running(group)) >= 7  # a guard; two ranks, each with a forkserver, and a worker
    parent.send_signal(number)
    parent.wait()
    end = time.monotonic() + 20
    while running(group) and time.monotonic() < end:
        time.sleep(0.05)
    left = running(group)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def running(group: int) -> list[int]:
    """Processes of a process group that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(number) == group and state != "Z":
            found.append(int(path.parent.name))
    return found
