"""Whole runs on several ranks that are struck by signals: each rank a process that can be ended."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from images import make_dataset
from pictures import draw_none
from ports import free_port
from ranks import start_forkserver
from small_recipe import small_recipe

from scale_smog import checkpoint
from scale_smog.runtime import phases

PATIENCE_S = 600.0
GRACE_S = 10.0  # for the others, when a rank has failed
OVERRIDES = (
    "run.steps=12",
    "run.checkpoint_every=2",
    "run.evaluate_every=5",
    "run.keep_checkpoints=4",
    "data.global_batch=8",
    "model.head_width=16",
)


class Strike(NamedTuple):
    """A signal that a rank gets: so many seconds after it began a phase for the n-th time."""

    number: int  # of the signal
    rank: int
    phase: str  # "start": after the process began
    occurrence: int = 1
    delay_s: float = 0.0


@dataclass
class Job:
    """A run in `folder/run`, on ranks of this machine.

    Args:
        folder: for the run and the ranks' consoles.
        data: the dataset.
        overrides: of the small recipe.
        hook: called in every rank before the run, with its number; at the top of its module.
    """

    folder: Path
    data: Path
    overrides: Sequence[str] = OVERRIDES
    world_size: int = 2
    hook: Callable[[int], None] | None = None
    processes: list = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, strike: Strike | None = None) -> None:
        """Starts all ranks."""
        (self.folder / "struck").unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        start_forkserver()
        port = free_port()
        self.processes = [
            context.Process(target=_run_rank, args=(rank, port, self._bare(), strike), daemon=True)
            for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()

    def _bare(self) -> "Job":
        return Job(self.folder, self.data, self.overrides, self.world_size, self.hook)

    def wait(self, patience_s: float = PATIENCE_S, grace_s: float = GRACE_S) -> list[int | None]:
        """Exit codes of all ranks, None for those that had to be ended; as a launcher would.

        A rank that fails takes the others with it after a while.
        """
        end, has_failed = time.monotonic() + patience_s, False
        while any(p.is_alive() for p in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
            if not has_failed and any(p.exitcode not in (None, 0) for p in self.processes):
                has_failed = True
                end = min(end, time.monotonic() + grace_s)
        codes = [p.exitcode for p in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        return codes

    def run(self, strike: Strike | None = None, patience_s: float = PATIENCE_S) -> list[int | None]:
        """Starts and waits."""
        self.start(strike)
        return self.wait(patience_s)

    def console(self, rank: int = 0) -> str:
        """What a rank said, in all its starts."""
        path = self.folder / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def struck_at(self) -> float | None:
        """time.time() of the strike, if it came."""
        path = self.folder / "struck"
        return float(path.read_text()) if path.exists() and path.read_text() else None

    def logged_step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(whole[-1])["step"] if whole else 0

    def saved_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        folders = checkpoint.list_checkpoints(self.run_dir)
        whole = [f for f in folders if checkpoint.find_damage(f) is None]
        return int(whole[-1].name.removeprefix("step-")) if whole else None

    def resumed_steps(self) -> list[int]:
        """The step that each start after the first went on from."""
        return [int(x) for x in re.findall(r"resuming .* after step (\d+)", self.console())]

    def final_state(self) -> dict[str, torch.Tensor]:
        """Tensors of the newest checkpoint."""
        return checkpoint.load(checkpoint.list_checkpoints(self.run_dir)[-1])[0]

    def clear(self) -> None:
        """Removes the run."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbs: what the others are compared with."""

    data: Path
    world_size: int
    state: dict[str, torch.Tensor]  # of its last checkpoint
    seconds: float  # that it took, without what each first start imports

    @classmethod
    def trained(cls, folder: Path, world_size: int = 2) -> "Undisturbed":
        """Makes a small dataset and trains on it."""
        data = make_dataset(folder / "data")
        job = Job(folder / "undisturbed", data, world_size=world_size)
        start_forkserver()
        imported = multiprocessing.get_context("forkserver").Process(target=int)
        imported.start()
        imported.join()
        start = time.monotonic()
        assert not any(job.run()), job.console()
        return cls(data, world_size, job.final_state(), time.monotonic() - start)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that do not have the same bits."""
    same = a.keys() & b.keys()
    return sorted((a.keys() | b.keys()) - {name for name in same if torch.equal(a[name], b[name])})


def _run_rank(rank: int, port: int, job: Job, strike: Strike | None) -> None:
    # A rank of its own: the server that it was forked from ignores what a launcher sends.
    job.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(job.folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(max(job.world_size, os.cpu_count() or 1)),  # one thread each
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    # As launcher/pretrain.py does before it imports anything.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    if strike is not None and strike.rank == rank:
        _arm(strike, job.folder)
    if job.hook is not None:
        job.hook(rank)
    from scale_smog.distributed import end_process
    from scale_smog.errors import exits_on_user_error
    from scale_smog.pretrain import pretrain

    draw_none()
    with exits_on_user_error():
        pretrain(small_recipe(job.folder, job.data, *job.overrides))
    end_process()
    os._exit(0)


def _arm(strike: Strike, folder: Path) -> None:
    def fire() -> None:
        time.sleep(strike.delay_s)
        (folder / "struck").write_text(str(time.time()))
        os.kill(os.getpid(), strike.number)

    if strike.phase == phases.START:
        threading.Thread(target=fire, daemon=True).start()
        return
    num_left = strike.occurrence

    def entered(phase: str) -> None:
        nonlocal num_left
        num_left -= phase == strike.phase
        if phase == strike.phase and num_left == 0:
            if strike.delay_s:
                threading.Thread(target=fire, daemon=True).start()
            else:
                fire()

    phases.on_enter.append(entered)
