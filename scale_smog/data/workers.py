"""Runs a function over jobs in several processes that end with their parent."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import TypeVar

from scale_smog.errors import UserError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def num_usable_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def start_forkserver(*modules: str) -> None:
    """Starts the forkserver of the workers in the background, with `modules` preloaded."""
    multiprocessing.set_forkserver_preload([__name__, *modules])
    forkserver.ensure_running()


def run_in_processes(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int
) -> Iterator[tuple[int, _Result]]:
    """Yields (index of the job, its result) in the order in which jobs finish.

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
    with ProcessPoolExecutor(workers, context, initializer=_exit_with_parent) as pool:
        futures = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory; "
                "run the same command again with fewer workers, it continues"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed, so that a resumed run has the folder alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
