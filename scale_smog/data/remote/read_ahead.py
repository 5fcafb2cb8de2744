"""Fetches what a plan will read, in the order of need, and removes what it needs last.

The processes of a machine share the work by stripes of the tars. Each goes through the steps ahead
in windows that grow with its lead: near the reader a window is a few steps, far ahead of it a large
part of what the cache holds. Of a window neighbours in a tar are merged into one request, so near
ones are fetched as single images and far ones, or those of `data.order=block`, as whole stripes.

An evaluation amid a training works on the same cache by a plan of its own, and removes what the
training's plan wants. So a reader that goes on after others have removed samples has the steps
ahead of it looked at again.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from scale_smog.data.plan import NEVER
from scale_smog.data.remote.cache import ABSENT, COMING, PRESENT, ShardCache
from scale_smog.data.tar_files import TarIndex
from scale_smog.runtime.stores import Store

T = TypeVar("T")

NUM_FETCHERS = 32  # requests at a time: at 20 ms and 110 KB an image 1,500 images a second
# A request takes about as long as reading this much more: 20 ms at 100 MB/s would be 2 MB, but what
# lies between the images that are wanted costs the store's and the machine's network. A cache that
# holds all keeps it for later, and a request costs as much of a core as reading 1 MB.
MERGED_GAP_BYTES = 256 * 2**10
GAP_FACTOR_OF_FULL_CACHE = 4
FIRST_STEPS = 16  # of a window beside the reader: loaders work up to that far ahead
IDLE_S = 0.05


class Plan(Protocol):
    """Sample ids by the step, and the step by sample ids."""

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray: ...

    def next_steps(self, step: int, ranks: range, world_size: int) -> np.ndarray: ...


class Node(NamedTuple):
    """Processes that share a cache, and what they read together."""

    ranks: range  # of the plan
    world_size: int  # of the plan
    process: int  # this one's place among them
    num_processes: int

    @classmethod
    def of_rank(cls, rank: int, world_size: int, ranks_per_node: int) -> "Node":
        """Launchers number ranks machine by machine; where machines differ each rank is its own."""
        if world_size % ranks_per_node:
            return cls(range(rank, rank + 1), world_size, 0, 1)
        process = rank % ranks_per_node
        first = rank - process
        return cls(range(first, first + ranks_per_node), world_size, process, ranks_per_node)

    def that_reads_all(self) -> "Node":
        """The same processes, each of which reads what a plan for a single rank says."""
        return self._replace(ranks=range(1), world_size=1)

    def ids(self, plan: Plan, steps: range) -> np.ndarray:
        """What these processes read in `steps`, in the order of the steps [n]."""
        ids = [plan.ids(s, r, self.world_size) for s in steps for r in self.ranks]
        return np.concatenate(ids) if ids else np.empty(0, np.int64)


class Range(NamedTuple):
    """Bytes of a tar that one request fetches."""

    shard: int
    start: int
    stop: int
    sample_ids: np.ndarray  # whole in it, and not in the cache


class ReadAhead:
    """Works on threads from its creation until `close`.

    Args:
        store: folder of the tars.
        index: of the tars.
        cache: of this machine.
        limit_bytes: of the cache, all processes together.
        plan: of all ranks.
        steps: that will be read.
        node: this process's place.

    Attributes:
        num_requests: ranges fetched so far.
    """

    def __init__(
        self,
        store: Store,
        index: TarIndex,
        cache: ShardCache,
        limit_bytes: int,
        plan: Plan,
        steps: range,
        node: Node,
    ):
        self._store, self._index, self._cache = store, index, cache
        self._plan, self._steps, self._node = plan, steps, node
        self._own = cache.stripes % node.num_processes == node.process
        cache.forget_unfinished(self._own)
        self._limit_bytes = limit_bytes // node.num_processes
        holds_all = cache.extents.sum() <= limit_bytes
        self._gap_bytes = MERGED_GAP_BYTES * (GAP_FACTOR_OF_FULL_CACHE if holds_all else 1)
        self._read, self._ahead = steps.start, steps.start
        step_bytes = cache.extents.mean() * len(node.ids(plan, steps[:1]))
        self._most_ahead = max(1, int(limit_bytes / 2 / max(1, step_bytes)))
        self.num_requests = 0
        self._num_waiting = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_robbed = False  # others have removed samples since the reader's last step
        self._is_behind = False  # the steps ahead have to be looked at again
        self._pool = ThreadPoolExecutor(NUM_FETCHERS, "fetcher")
        self._advance()  # a reader that comes at once finds that its images are coming
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def followed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, one a step, while this keeps ahead of them; closes at their end."""
        try:
            for step, batch in enumerate(batches, self._steps.start):
                self._read = step
                yield batch
                self._notice_removals()
        finally:
            self.close()

    def close(self) -> None:
        """Fetches no more; what is on its way comes to its end in the background."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False)  # what waits there finds it closed, and gives up its images

    def _notice_removals(self) -> None:
        """Begins again beside the reader if others have removed samples.

        Only when the reader goes on: one that waits for an evaluation would take from it what it
        has fetched.
        """
        is_robbed = self._is_robbed or self._cache.remover not in (None, self)
        with self._changed:
            if is_robbed:
                self._is_robbed, self._cache.remover = False, self
                self._is_behind = True
            if is_robbed or self._is_at_end():
                self._changed.notify_all()

    def _is_at_end(self) -> bool:
        """Whether the reader needs nothing more."""
        return self._read >= self._steps.stop - 1

    def _awaits_work(self) -> bool:
        """Waits while all steps are fetched; False when there will be no more to do."""

        def may_go_on() -> bool:
            has_work = self._is_behind or self._ahead < self._steps.stop
            return has_work or self._is_closed or self._is_at_end()

        with self._changed:
            self._changed.wait_for(may_go_on)
            return not self._is_closed and (self._is_behind or self._ahead < self._steps.stop)

    def _run(self) -> None:
        try:
            while self._awaits_work():
                if not self._cache.is_writable:
                    return
                if not self._advance():
                    with self._changed:
                        self._changed.wait(IDLE_S)
        except RuntimeError:
            if not self._is_closed:  # else it is the pool that takes no more
                raise

    def _advance(self) -> bool:
        """Begins with the next window, if there is room for it and the last one is almost here."""
        if self._is_behind:
            self._is_behind = False
            self._ahead = min(self._ahead, self._read + 1)
        lead = self._ahead - self._read
        num_steps, room = max(FIRST_STEPS, lead // 2), self._most_ahead - lead
        # At the most ahead it waits for room for a large window: of small ones nothing merges.
        if self._num_waiting >= NUM_FETCHERS or room < min(num_steps, -(-self._most_ahead // 4)):
            return False
        num_steps = min(num_steps, room)
        window = range(self._ahead, min(self._ahead + num_steps, self._steps.stop))
        ids = self._node.ids(self._plan, window)
        ranges = self._ranges(ids, self._gap_bytes)
        if not self._make_room(self._num_bytes(ranges), window):
            if lead >= FIRST_STEPS:
                return False
            # The reader is near, and what lies between its images would fill the cache: without it.
            ranges = self._ranges(ids, gap_bytes=0)
            if not self._make_room(self._num_bytes(ranges), window):
                return False
        self._ahead = window.stop
        for each in ranges:
            self._cache.states[each.sample_ids] = COMING
        with self._changed:
            self._num_waiting += len(ranges)
        for each in ranges:
            self._pool.submit(self._fetch, each)
        return True

    def _ranges(self, ids: np.ndarray, gap_bytes: int) -> list[Range]:
        """What this process has to fetch for samples [n], in the order of need.

        Of a stripe, those that are at most `gap_bytes` apart are one range.
        """
        order = np.full(len(self._own), len(ids))
        order[ids[::-1]] = np.arange(len(ids))[::-1]  # when each is needed first
        wanted = np.unique(ids[self._own[ids] & (self._cache.states[ids] == ABSENT)])
        if not len(wanted):
            return []
        offsets, sizes = self._index.rows["offset"][wanted], self._index.rows["size"][wanted]
        stripes = self._cache.stripes[wanted]
        ends = offsets + sizes
        is_cut = (np.diff(stripes) != 0) | (offsets[1:] - ends[:-1] > gap_bytes)
        is_cut |= np.diff(offsets) < 0
        parts = np.split(np.arange(len(wanted)), np.flatnonzero(is_cut) + 1)
        ranges = []
        for part in parts:
            between = np.arange(int(wanted[part[0]]), int(wanted[part[-1]]) + 1)
            absent = between[self._cache.states[between] == ABSENT]
            shard = self._index.shard(int(wanted[part[0]]))
            ranges.append(Range(shard, int(offsets[part[0]]), int(ends[part[-1]]), absent))
        return sorted(ranges, key=lambda each: order[each.sample_ids].min())

    def _num_bytes(self, ranges: Sequence[Range]) -> int:
        """That they will take in the cache."""
        return sum(int(self._cache.extents[each.sample_ids].sum()) for each in ranges)

    def _make_room(self, num_bytes: int, window: range) -> bool:
        """Removes what is needed last until `num_bytes` fit; False if all is needed before."""
        excess = self._cache.num_bytes(self._own) + num_bytes - self._limit_bytes
        if excess <= 0:
            return True
        planned = self._plan.next_steps(self._read, self._node.ranks, self._node.world_size)
        next_steps = np.full(len(self._own), NEVER)
        next_steps[: len(planned)] = planned
        may_go = self._own & (self._cache.states == PRESENT) & (next_steps >= window.stop)
        candidates = np.flatnonzero(may_go)
        candidates = candidates[np.argsort(-next_steps[candidates], kind="stable")]
        freed = np.cumsum(self._cache.extents[candidates])
        if not len(freed) or freed[-1] < excess:
            return False
        # A tenth more than must be, so that this is not done for every window.
        excess = max(excess, min(int(freed[-1]), excess + self._limit_bytes // 10))
        self._cache.remove(candidates[: int(np.searchsorted(freed, excess)) + 1])
        # Said afterwards: a reader that asks meanwhile would take note of it too early.
        self._is_robbed |= self._cache.remover not in (None, self)
        self._cache.remover = self
        return True

    def _fetch(self, wanted: Range) -> None:
        """Runs in the pool."""
        try:
            if not self._is_closed:
                self._fetch_range(wanted)
        except OSError:
            pass  # the reader will ask for itself, and say what it meets
        finally:
            left = wanted.sample_ids[self._cache.states[wanted.sample_ids] == COMING]
            self._cache.forget(left)
            with self._changed:
                self._num_waiting -= 1
                self._changed.notify_all()

    def _fetch_range(self, wanted: Range) -> None:
        tar = self._index.names[wanted.shard]
        self.num_requests += 1
        content = self._store.read(tar, wanted.start, wanted.stop)
        rows = self._index.rows[wanted.sample_ids]
        starts = rows["offset"] - wanted.start
        whole = [
            self._index.is_whole(int(i), content[start : start + size])
            for i, start, size in zip(wanted.sample_ids, starts, rows["size"], strict=True)
        ]
        self._cache.write(tar, wanted.start, content, wanted.sample_ids[whole])
