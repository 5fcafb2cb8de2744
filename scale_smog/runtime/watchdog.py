"""Every phase has a timeout; the rank that holds up the others is named, with host and phase.

A rank that waits in a collective cannot speak, so a thread of each does: it sends heartbeats to a
store on rank 0's host, and when its own phase takes too long it looks who is stalled.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self, TypeVar

import torch.distributed as dist

from scale_smog import distributed
from scale_smog.config import DeadlinesConfig
from scale_smog.distributed.process_group import TIMEOUT_EXIT_CODE
from scale_smog.errors import first_few
from scale_smog.runtime import flight_recorder, phases, rank_logs

T = TypeVar("T")

HEARTBEAT_S = 0.5  # between two heartbeats, of a few ranks
MAX_PER_S = 200  # heartbeats of all ranks together, which rank 0's host hears
MIN_SHARE = 0.2  # of the time between two heartbeats, where phases change quickly
STALLED = 4  # times between two heartbeats: a rank without a new one is stalled
LOOK_S, LOOK_SHARE = 8.0, 0.125  # before a timeout: ranks that share cores are slow, not stalled
STORE_TIMEOUT_S = 3.0
WARN_AFTER_S = 15.0  # without a heartbeat: long before the timeout of the phase
SILENCE_S = 60.0  # after a warning
NUM_MONITORS = 2  # ranks that watch all others; the second, should the first be lost
MARGIN_S = 10.0  # to abort and for the launcher, so that the job ends within the timeout
OUTLAST_S = 60.0  # that rank 0, who has the store, waits at most for the others' own timeouts
REPORTER_KEY = "reporter"  # the first rank to know what is wrong says it on the console
COMPARE_TIMEOUT_S = 6.0
NO_HEARTBEAT = "no heartbeat from"
ADVICE = "the same command goes on from the newest checkpoint, also with fewer hosts"
ENDED = "ended"  # in place of a phase, when there is nothing to watch any more
TIMEOUT_KEYS = {
    phases.START: "start_s",
    phases.DATA: "data_s",
    phases.STEP: "step_s",
    phases.KMEANS: "kmeans_s",
    phases.EVALUATION: "evaluation_s",
    phases.SAVING: "saving_s",
}


class Heartbeat(NamedTuple):
    """What a rank sends while it is alive."""

    host: str
    phase: str
    num_phases: int  # entered so far; all ranks enter the same ones
    number: int  # of this heartbeat


class Diagnosis(NamedTuple):
    """Who holds up the others.

    Attributes:
        text: of a message.
        hosts: of all ranks; none where rank 0's store does not answer.
        is_first: whether this rank is the first that is alive, or of its host without a store.
    """

    text: str
    hosts: list[str]
    is_first: bool


class Watchdog:
    """Watches this rank from beginning to end (`with`); to begin is a collective.

    Args:
        config: the recipe's section.
    """

    def __init__(self, config: DeadlinesConfig):
        self._timeouts = {phase: getattr(config, key) for phase, key in TIMEOUT_KEYS.items()}
        self._phase, self._num_phases, self._num_heartbeats = phases.START, 0, 0
        self._num_steps = 0
        self._since = time.monotonic()
        self._host = socket.gethostname()
        self._is_over, self._has_news = threading.Event(), threading.Event()
        self._is_aborting = threading.Event()
        self._heartbeat_s = max(HEARTBEAT_S, distributed.world_size() / MAX_PER_S)
        self._stalled_s = STALLED * self._heartbeat_s
        self._previous: list[Heartbeat] = []  # of all ranks, as a monitor saw them last
        self._warn_after_s = max(WARN_AFTER_S, 2 * self._stalled_s)
        self._next_look = self._since + self._warn_after_s
        self._silent_until = 0.0
        self._warned: set[int] = set()

    def __enter__(self) -> Self:
        self._store = _start_store()
        phases.on_enter.append(self._enter)
        if self._store is not None:
            self._send_heartbeat()
            distributed.barrier()  # from here on every rank has sent one
            self._sender = threading.Thread(target=self._send_heartbeats, daemon=True)
            self._sender.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        phases.on_enter.remove(self._enter)
        self._is_over.set()
        self._has_news.set()
        if self._store is not None:
            self._sender.join(STORE_TIMEOUT_S)  # it sends ENDED, unless rank 0 has ended before

    def report_lost_ranks(self) -> None:
        """Says which ranks are gone, where a collective has failed; takes a moment."""
        if self._is_aborting.is_set():  # its thread says what there is to say, and ends the process
            time.sleep(OUTLAST_S)
        if self._store is None:
            return
        self._publish()
        found = self._diagnose(self._stalled_s)
        if not found.is_first:  # the others end one after the other, and the first knows least
            return
        difference = self._difference(found)
        is_news = NO_HEARTBEAT in found.text or difference
        if is_news and self._is_reporter(found):
            text = f"error: {found.text}{difference}; {ADVICE}"
            print(text, file=rank_logs.console(), flush=True)
        if is_news:
            self._outlast_others(MARGIN_S)

    def _enter(self, phase: str) -> None:
        self._num_steps += self._phase == phases.STEP and phase != phases.KMEANS
        self._phase, self._since = phase, time.monotonic()
        self._num_phases += 1
        self._has_news.set()

    def _timeout(self) -> tuple[str, int]:
        """The key of the timeout that holds now, and its seconds."""
        is_start = self._num_steps == 0 and self._phase in (phases.DATA, phases.STEP)
        phase = phases.START if is_start else self._phase  # the first step may compile
        return TIMEOUT_KEYS[phase], self._timeouts[phase]

    def _send_heartbeat(self) -> None:
        self._num_heartbeats += 1
        phase = ENDED if self._is_over.is_set() else self._phase
        heartbeat = Heartbeat(self._host, phase, self._num_phases, self._num_heartbeats)
        assert self._store is not None
        self._store.set(_key(distributed.rank()), json.dumps(heartbeat))

    def _send_heartbeats(self) -> None:
        is_over = False
        while not is_over:
            self._has_news.wait(self._heartbeat_s)
            self._has_news.clear()
            time.sleep(MIN_SHARE * self._heartbeat_s)
            is_over = self._is_over.is_set()
            try:
                self._send_heartbeat()
            except RuntimeError:
                return  # rank 0's host is gone: `_watch` will see that it does not answer

    def _watch(self) -> None:
        while not self._is_over.wait(HEARTBEAT_S):
            with suppress(Exception):  # it is the timeouts that must not fail
                self._warn_of_stalled()
            key, timeout_s = self._timeout()
            look_s = max(self._stalled_s, min(LOOK_S, LOOK_SHARE * timeout_s))
            margin_s = MARGIN_S + look_s
            if time.monotonic() - self._since < timeout_s - min(margin_s, timeout_s / 2):
                continue
            watched = self._num_phases
            self._publish()  # all ranks come here at about the same time
            found = self._diagnose(look_s)
            if self._num_phases != watched or self._is_over.is_set():
                continue  # it went on in time after all
            self._abort(f"deadlines.{key}={timeout_s} has passed: {found.text}", found)

    def _warn_of_stalled(self) -> None:
        """A monitor says it when a rank's heartbeat stops; it may come back."""
        is_monitor = self._store is not None and distributed.rank() < NUM_MONITORS
        now = time.monotonic()
        if not is_monitor or now < self._next_look:
            return
        self._next_look = now + self._warn_after_s
        stalled, alive, heartbeats = self._look()
        self._warned &= stalled
        news = stalled - self._warned
        if not news or now < self._silent_until:
            return
        self._silent_until = now + SILENCE_S
        self._warned |= news
        if distributed.rank() in alive[:1]:
            text = diagnose(heartbeats, sorted(news)) if heartbeats else self._rank_0_lost()
            print(f"warning: {text}", file=rank_logs.console(), flush=True)

    def _look(self) -> tuple[set[int], list[int], list[Heartbeat]]:
        """Ranks without a new heartbeat since the last look, the others that run, and all of them.

        No heartbeats where rank 0, who has the store, does not answer.
        """
        previous, newest = self._previous, self._heartbeats()
        if newest is None:
            return {0}, [1], []
        self._previous = newest
        running = [r for r in range(len(newest)) if newest[r].phase != ENDED]
        stalled = set(_stalled(previous, newest)) & set(running)
        return stalled, [r for r in running if r not in stalled], newest

    def _diagnose(self, look_s: float) -> Diagnosis:
        """Looks at the heartbeats for so many seconds, in which every rank must send one."""
        if self._store is None:
            time.sleep(look_s)
            return Diagnosis(f"{self._host} is still in phase '{self._phase}'", [], True)
        previous = self._heartbeats()
        time.sleep(look_s if previous else 0)
        newest = self._heartbeats() if previous else None
        if previous is None or newest is None:
            return Diagnosis(self._rank_0_lost(), [], os.environ.get("LOCAL_RANK", "0") == "0")
        stalled = _stalled(previous, newest)
        alive = [r for r in range(len(newest)) if r not in stalled]
        # Who has ended by itself, for lack of another, has said so.
        stalled = [r for r in stalled if newest[r].phase != ENDED] or stalled
        hosts = [heartbeat.host for heartbeat in newest]
        return Diagnosis(diagnose(newest, stalled), hosts, distributed.rank() in alive[:1])

    def _publish(self) -> None:
        self._ask(lambda store: flight_recorder.publish(store, distributed.rank()))

    def _difference(self, found: Diagnosis) -> str:
        """Which collectives of which ranks differ, among those that have published theirs."""
        hosts = found.hosts
        compared = self._ask(
            lambda store: flight_recorder.compare_published(store, hosts), COMPARE_TIMEOUT_S
        )
        return compared or ""

    def _is_reporter(self, found: Diagnosis) -> bool:
        """Whether this rank is to report: the first that asks, as timeouts end seconds apart."""
        if not found.hosts:
            return found.is_first
        place = self._ask(lambda store: store.add(REPORTER_KEY, 1))
        return place in (1, None)  # rather twice than never

    def _rank_0_lost(self) -> str:
        master = os.environ.get("MASTER_ADDR", "its host")
        return f"{NO_HEARTBEAT} rank 0 on {master}, asked from {self._host}"

    def _heartbeats(self) -> list[Heartbeat] | None:
        """The last one of every rank; None if the store does not answer."""
        keys = [_key(r) for r in range(distributed.world_size())]
        values = self._ask(lambda store: store.multi_get(keys))
        return None if values is None else [Heartbeat(*json.loads(value)) for value in values]

    def _ask(
        self, request: Callable[[dist.Store], T], timeout_s: float = STORE_TIMEOUT_S
    ) -> T | None:
        """What the store answers; None if it does not in time."""
        store = self._store
        if store is None:
            return None
        answers: SimpleQueue[T | None] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put(request(store))
            except RuntimeError:
                answers.put(None)

        # A daemon: the process must be able to end while a host that is gone does not answer.
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=timeout_s)
        except Empty:
            return None

    def _outlast_others(self, most_s: float) -> None:
        """On rank 0: without its store others would take it for the one that is lost."""
        if self._store is None or not distributed.is_main():
            return
        end, previous = time.monotonic() + most_s, None
        while (left_s := end - time.monotonic()) > 0 and not phases.is_stop_requested:
            newest = self._heartbeats()
            if previous is not None and newest is not None:
                running = {r for r in range(1, len(newest)) if newest[r].phase != ENDED}
                if running <= set(_stalled(previous, newest)):
                    return
            previous = newest
            time.sleep(min(self._stalled_s, left_s))

    def _abort(self, text: str, found: Diagnosis) -> None:
        self._is_aborting.set()
        try:
            speaks = self._is_reporter(found)
            text += self._difference(found) if speaks else ""
            main = sys._current_frames()[threading.main_thread().ident or 0]
            stack = "".join(traceback.format_stack(main))
            with suppress(Exception):  # with the launcher the console may be gone
                if speaks:
                    print(f"error: {text}; {ADVICE}\n{stack}", file=rank_logs.console(), flush=True)
                elif not distributed.is_main():  # whose stderr is the console
                    print(f"{text}\n{stack}", file=sys.stderr, flush=True)  # this rank's log
            flight_recorder.dump(distributed.rank())
            self._outlast_others(OUTLAST_S)
        finally:
            os._exit(TIMEOUT_EXIT_CODE)


def diagnose(heartbeats: list[Heartbeat], stalled: list[int]) -> str:
    """Names the ranks that hold up the others.

    Args:
        heartbeats: the last one of every rank.
        stalled: ranks that sent no new one.
    """
    if stalled:
        names = first_few([f"rank {r} on {heartbeats[r].host}" for r in stalled])
        phase = heartbeats[stalled[0]].phase
        return f"{NO_HEARTBEAT} {names}, last seen in phase '{phase}': stopped, ended or cut off"
    least = min(heartbeat.num_phases for heartbeat in heartbeats)
    behind = [r for r, heartbeat in enumerate(heartbeats) if heartbeat.num_phases == least]
    if len(behind) == len(heartbeats):
        phase = heartbeats[0].phase
        return f"all ranks are alive in phase '{phase}' and wait for one another"
    return f"the others wait for {first_few([_name(r, heartbeats[r]) for r in behind])}"


def _stalled(previous: list[Heartbeat], newest: list[Heartbeat]) -> list[int]:
    """Ranks that sent no new heartbeat; none if there is nothing to compare with."""
    both = zip(previous, newest, strict=False)
    return [r for r, (a, b) in enumerate(both) if a.number == b.number]


def _name(rank: int, heartbeat: Heartbeat) -> str:
    return f"rank {rank} on {heartbeat.host} in phase '{heartbeat.phase}'"


def _key(rank: int) -> str:
    return f"heartbeat-of-rank-{rank}"


def _start_store() -> dist.Store | None:
    """A store on rank 0's host, for heartbeats; None for a single rank. A collective."""
    world_size = distributed.world_size()
    if world_size == 1:
        return None
    host, timeout = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
    store = None
    if distributed.is_main():
        store = dist.TCPStore(host, 0, world_size, True, timeout, wait_for_workers=False)
    port = distributed.broadcast_object(store.port if store else 0)
    if store is None:
        store = dist.TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
    return store
