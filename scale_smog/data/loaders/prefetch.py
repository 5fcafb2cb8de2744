"""Works ahead of the training loop, a bounded number of batches."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prefetch(
    function: Callable[[_Item], _Result], items: Iterable[_Item], depth: int
) -> Generator[_Result, None, None]:
    """Yields `function(item)` in order; one thread computes up to `depth` results in advance.

    What the function raises is raised here, at its item.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
