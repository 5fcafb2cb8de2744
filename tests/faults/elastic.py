"""Kills ranks under several torchrun agents with restarts: `elastic.py --agents 4 --ranks 4`.

Each agent counts its restarts for itself: of a rank that is killed before it has met the others
only its own agent takes note. All ranks must meet again, once more after a rank is killed in the
middle of the training, and the run must go on from its checkpoint to its end. Exit status 0 only if
it does.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from images import make_dataset
from jobs import Job
from ports import free_port
from small_recipe import write_small_recipe

ROOT = Path(__file__).parent.parent.parent
# What a rank says before it runs a program: how often its agent has restarted it, and its process.
# torchrun's ranks are unbuffered and write at once: each says it in one piece.
ANNOUNCING = """
import os, sys
rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"started {rank} {count} {os.getpid()}\\n", end="")
sys.argv[:1] = []
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""
PATIENCE_S = 600.0


class Agents:
    """torchrun on several "nodes" of this machine.

    Args:
        folder: for the agents' consoles.
        num_agents: nodes.
        num_ranks: of each.
        program: file and arguments.
    """

    def __init__(self, folder: Path, num_agents: int, num_ranks: int, program: Sequence[str]):
        self._folder = folder
        announcing = folder / "announcing.py"
        announcing.write_text(ANNOUNCING)
        torchrun = str(Path(sys.executable).parent / "torchrun")
        command = [torchrun, "--nnodes", str(num_agents), "--nproc-per-node", str(num_ranks)]
        command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "elastic"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
        self._command = [*command, str(announcing), *program]
        self.jobs = [self._start(number) for number in range(num_agents)]

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        with open(self._folder / f"agent-{number}.log", "wb") as log:
            return subprocess.Popen(
                self._command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )

    def said(self, number: int) -> str:
        """An agent's console, its ranks' words included."""
        return (self._folder / f"agent-{number}.log").read_text(errors="replace")

    def starts(self, number: int) -> list[tuple[int, int, int]]:
        """Rank, restart count and process of every start of an agent."""
        found = re.findall(r"started (\d+) (\d+) (\d+)", self.said(number))
        return [(int(rank), int(count), int(pid)) for rank, count, pid in found]

    def restart_counts(self) -> list[int]:
        """The last one of each agent."""
        return [self.starts(number)[-1][1] for number in range(len(self.jobs))]

    def kill_rank(self) -> int:
        """Kills the newest rank of the last agent; returns its number."""
        rank, _, pid = self.starts(len(self.jobs) - 1)[-1]
        os.kill(pid, signal.SIGKILL)
        return rank

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits; ends everything if an agent fails or time is over."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end or any(job.poll() for job in self.jobs):
                self.end()
                raise AssertionError(self.said(0)[-4000:])
            time.sleep(0.05)

    def wait(self) -> list[int]:
        """Exit statuses of the agents."""
        self.wait_until(lambda: all(job.poll() is not None for job in self.jobs))
        return [job.wait() for job in self.jobs]

    def end(self) -> None:
        """Ends the agents, and with them their ranks."""
        for job in self.jobs:
            job.terminate()
            job.wait()


def campaign(folder: Path, num_agents: int, num_ranks: int, num_steps: int) -> bool:
    """Kills a rank at the start and one in training; whether the run reaches its end."""
    job = Job(folder, make_dataset(folder / "data"))
    program = [str(ROOT / "launcher" / "pretrain.py"), str(write_small_recipe(folder, job.data))]
    program += [f"run.steps={num_steps}", "run.checkpoint_every=2", "grouping.reset_every=4"]
    program += [f"data.global_batch={2 * num_agents * num_ranks}"]
    agents = Agents(folder, num_agents, num_ranks, program)
    last, start = num_agents - 1, time.monotonic()
    agents.wait_until(lambda: len(agents.starts(last)) == num_ranks)
    print(f"rank {agents.kill_rank()} killed before it has met the others", flush=True)
    agents.wait_until(lambda: job.logged_step() >= 3)
    print(f"{time.monotonic() - start:.0f} s: training after restarts {agents.restart_counts()}")
    counts = set(agents.restart_counts())
    print(f"rank {agents.kill_rank()} killed after step {job.logged_step()}", flush=True)
    statuses = agents.wait()
    resumed = re.search(r"resuming .* after step \d+", "".join(map(agents.said, range(num_agents))))
    print(
        f"{time.monotonic() - start:.0f} s: {resumed and resumed.group()}; ended after step "
        f"{job.logged_step()}, agents with {statuses} after restarts {agents.restart_counts()}"
    )
    has_ended = not any(statuses) and job.logged_step() == num_steps
    return has_ended and resumed is not None and len(counts) > 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4, help="of each agent")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = arguments.agents, arguments.ranks, arguments.steps
        is_good = campaign(Path(folder), *counts)
    print("the run has reached its end" if is_good else "NOT GOOD")
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
