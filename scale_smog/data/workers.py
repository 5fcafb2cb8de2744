"""How many workers a rank may start, and jobs in processes that end with their parent."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, reduction
from typing import IO, Any, TypeVar

from scale_smog.config import DataConfig
from scale_smog.errors import UserError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
WORKER_BYTES = 2**30  # of a decoding process, with the batches that it has made


def num_usable_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def workers_of_rank(wanted: int, num_ranks: int) -> int:
    """Decoding processes that a rank starts: at most its share of the machine's cores and memory.

    Args:
        wanted: data.workers.
        num_ranks: that share the cores of this rank.
    """
    import psutil  # a step of given views needs none

    memory = psutil.virtual_memory().available // num_ranks // WORKER_BYTES
    return min(wanted, num_usable_cores() // num_ranks, memory)


def describe_workers(
    data: DataConfig, workers: Sequence[int], num_ranks: int, num_cores: Sequence[int]
) -> str:
    """What ranks start, in words.

    Args:
        data: the recipe's section.
        workers: the numbers of `workers_of_rank` among the ranks.
        num_ranks: of the job.
        num_cores: the numbers of cores that ranks may use.
    """
    what = "threads" if data.loader in ("dali", "fast", "stream") else "processes"
    each = f"{' or '.join(map(str, workers))} decoding {what} each"
    if data.loader in ("memory", "synthetic"):
        each = f"none in training, and {each} in an evaluation"
    cores = f"{' or '.join(map(str, num_cores))} cores"
    return f"{num_ranks} rank(s) start {each} (data.workers={data.workers}; of {cores})"


def start_forkserver(*modules: str) -> None:
    """Starts the forkserver of the workers in the background, with `modules` preloaded."""
    multiprocessing.set_forkserver_preload([__name__, *modules])
    forkserver.ensure_running()


class KeptOpen:
    """A file that workers hold open as their parent does, so that its lock lasts for them too."""

    def __init__(self, file: IO[str]):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (reduction.DupFd(self.file.fileno()),)  # pyright: ignore


def _reopened(descriptor: Any) -> KeptOpen:
    return KeptOpen(os.fdopen(descriptor.detach(), "w"))


def run_in_processes(
    function: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    workers: int,
    lock: IO[str] | None = None,
    advice: str = "",
) -> Iterator[tuple[int, _Result]]:
    """Yields (index of the job, its result) in the order in which jobs finish.

    Args:
        function: at the top of its module.
        jobs: what it is called with, one after another.
        workers: processes, if there are more than one.
        lock: an open file whose lock lasts until the last of the workers has ended.
        advice: what the user is told besides when a worker was killed.

    Raises:
        UserError: a worker process was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from ((index, function(job)) for index, job in enumerate(jobs))
        return
    # Not fork: it would copy the locks of whatever threads the caller runs. Not spawn: every
    # worker would import everything again.
    context = multiprocessing.get_context("forkserver")
    kept = KeptOpen(lock) if lock else None
    with ProcessPoolExecutor(
        workers, context, initializer=exit_with_parent, initargs=(kept,)
    ) as pool:
        futures = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory; "
                f"run the same command again{advice}"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def exit_with_parent(kept: object) -> None:
    """Ends this worker when its parent is killed: a resumed run has folder and memory alone.

    torch's own workers watch the process that they were forked from, which they keep alive.

    Args:
        kept: is open for as long as the process lives.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"

    def watch(_kept: object = kept) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
