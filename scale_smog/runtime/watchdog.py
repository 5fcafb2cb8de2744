"""Every phase has a deadline; the one who is behind is named by rank, host and phase.

A rank that waits in a collective cannot speak, so a thread of each does: it shows a sign of life
in a store on rank 0's host, and when its own phase takes too long it looks who shows none.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self

import torch.distributed as dist

from scale_smog import distributed
from scale_smog.config import DeadlinesConfig
from scale_smog.runtime import phases, rank_logs

EXIT_CODE = 3  # 1 is any exception, 2 a user's error
BEAT_S = 0.5  # between two signs of life
LEAST_S = 0.1  # rank 0's host has many ranks to listen to
LOOK_S = 4 * BEAT_S  # between two looks at the others: who shows no sign of life in it has none
ANSWER_S = 3.0  # of rank 0's host
ALARM_S = 15.0  # who shows no sign of life for so long is named long before the deadline
NUM_MONITORS = 2  # ranks that watch all others: should the first be lost, there is the second
LEAD_S = 12.0  # looking, ending and a launcher's share in it, so that a job ends in time
LOST = "no more sign of life from"
ADVICE = "the same command goes on from the newest checkpoint, also with fewer hosts"
ENDED = "ended"  # in place of a phase, when there is nothing to watch any more
LIMITS = {
    phases.START: "start_s",
    phases.DATA: "data_s",
    phases.STEP: "step_s",
    phases.KMEANS: "kmeans_s",
    phases.EVALUATION: "evaluation_s",
    phases.SAVING: "saving_s",
}


class Heartbeat(NamedTuple):
    """A rank's sign of life."""

    host: str
    phase: str
    num_phases: int  # entered so far; all ranks enter the same ones
    num_beats: int


class Watchdog:
    """Watches this rank from beginning to end (`with`); to begin is a collective.

    Args:
        config: the recipe's section.
    """

    def __init__(self, config: DeadlinesConfig):
        self._limits = {phase: getattr(config, key) for phase, key in LIMITS.items()}
        self._phase, self._num_phases, self._num_beats = phases.START, 0, 0
        self._num_steps = 0
        self._since = time.monotonic()
        self._host = socket.gethostname()
        self._is_over, self._is_news = threading.Event(), threading.Event()
        self._known: list[Heartbeat] = []  # of all ranks, as a witness saw them last
        self._alarm_at = self._since + ALARM_S
        self._named: set[int] = set()

    def __enter__(self) -> Self:
        self._store = _common_store()
        phases.on_enter.append(self._enter)
        if self._store is not None:
            self._show()
            distributed.barrier()  # from here on every rank has shown a sign
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        phases.on_enter.remove(self._enter)
        self._is_over.set()
        self._is_news.set()
        if self._store is not None:
            self._heart.join(ANSWER_S)  # which shows it, unless rank 0 has ended before

    def report_lost_ranks(self) -> None:
        """Says which ranks are gone, where a collective has failed; takes a moment."""
        if self._store is not None:
            text, speaks = self._look()
            if speaks and LOST in text:
                print(f"error: {text}; {ADVICE}", file=sys.stderr, flush=True)

    def _enter(self, phase: str) -> None:
        self._num_steps += self._phase == phases.STEP and phase != phases.KMEANS
        self._phase, self._since = phase, time.monotonic()
        self._num_phases += 1
        self._is_news.set()

    def _limit(self) -> tuple[str, int]:
        """The key of the deadline that holds now, and its seconds."""
        is_start = self._num_steps == 0 and self._phase in (phases.DATA, phases.STEP)
        phase = phases.START if is_start else self._phase  # the first step may compile
        return LIMITS[phase], self._limits[phase]

    def _show(self) -> None:
        self._num_beats += 1
        phase = ENDED if self._is_over.is_set() else self._phase
        sign = Heartbeat(self._host, phase, self._num_phases, self._num_beats)
        assert self._store is not None
        self._store.set(_key(distributed.rank()), json.dumps(sign))

    def _beat(self) -> None:
        is_over = False
        while not is_over:
            self._is_news.wait(BEAT_S)
            self._is_news.clear()
            time.sleep(LEAST_S)
            is_over = self._is_over.is_set()
            try:
                self._show()
            except RuntimeError:
                return  # rank 0's host is gone: `_watch` will see that it does not answer

    def _watch(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with suppress(Exception):  # it is the deadlines that must not fail
                self._warn_of_stalled()
            key, limit_s = self._limit()
            if time.monotonic() - self._since < limit_s - min(LEAD_S, limit_s / 2):
                continue
            watched = self._num_phases
            verdict, speaks = self._look()
            if self._num_phases != watched or self._is_over.is_set():
                continue  # it went on in time after all
            self._end(f"deadlines.{key}={limit_s} has passed: {verdict}", speaks)

    def _warn_of_stalled(self) -> None:
        """A witness says it when a rank stops showing signs of life; that may end by itself."""
        is_monitor = self._store is not None and distributed.rank() < NUM_MONITORS
        if not is_monitor or time.monotonic() < self._alarm_at:
            return
        self._alarm_at = time.monotonic() + ALARM_S
        before, now = self._known, self._heartbeats()
        if now is None:  # rank 0 has the store
            stalled, alive, said = [0], [1], self._lost_first()
        else:
            self._known = now
            present = [r for r in range(len(now)) if now[r].phase != ENDED]
            stalled = [r for r in _stalled(before, now) if r in present]
            alive = [r for r in present if r not in stalled]
            said = verdict(now, [r for r in stalled if r not in self._named])
        news, self._named = set(stalled) - self._named, set(stalled)
        if news and distributed.rank() in alive[:1]:
            print(f"warning: {said}", file=rank_logs.console(), flush=True)

    def _look(self) -> tuple[str, bool]:
        """Who is behind, and whether this rank is the one to say it."""
        if self._store is None:
            time.sleep(LOOK_S)
            return f"{self._host} is still in phase '{self._phase}'", True
        before = self._heartbeats()
        time.sleep(LOOK_S)
        now = self._heartbeats()
        if before is None or now is None:
            return self._lost_first(), os.environ.get("LOCAL_RANK", "0") == "0"
        stalled = _stalled(before, now)
        alive = [r for r in range(len(now)) if r not in stalled]
        speaks = bool(alive) and distributed.rank() == alive[0]
        return verdict(now, stalled), speaks

    def _lost_first(self) -> str:
        master = os.environ.get("MASTER_ADDR", "its host")
        return f"{LOST} rank 0 on {master}, asked from {self._host}"

    def _heartbeats(self) -> list[Heartbeat] | None:
        """Of all ranks; None if the store does not answer."""
        store = self._store
        assert store is not None
        keys = [_key(r) for r in range(distributed.world_size())]
        answers: SimpleQueue[list[bytes] | None] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put(store.multi_get(keys))
            except RuntimeError:
                answers.put(None)

        # A daemon: the process must be able to end while a host that is gone does not answer.
        threading.Thread(target=ask, daemon=True).start()
        try:
            signs = answers.get(timeout=ANSWER_S)
        except Empty:
            return None
        return None if signs is None else [Heartbeat(*json.loads(sign)) for sign in signs]

    def _end(self, text: str, speaks: bool) -> None:
        if speaks:
            main = sys._current_frames()[threading.main_thread().ident or 0]
            stack = "".join(traceback.format_stack(main))
            with suppress(Exception):  # with the launcher the console may be gone
                print(f"error: {text}; {ADVICE}\n{stack}", file=rank_logs.console(), flush=True)
        time.sleep(2 * BEAT_S)  # on rank 0 the others may still be looking into the store
        os._exit(EXIT_CODE)


def verdict(signs: list[Heartbeat], stalled: list[int]) -> str:
    """Names the ranks that hold up the others.

    Args:
        signs: the last one of every rank.
        stalled: ranks that showed no new one.
    """
    if stalled:
        names = [f"rank {r} on {signs[r].host}" for r in stalled[:8]]
        phase = signs[stalled[0]].phase
        return f"{LOST} {', '.join(names)}, last seen in phase '{phase}': stopped, ended or cut off"
    least = min(sign.num_phases for sign in signs)
    behind = [r for r, sign in enumerate(signs) if sign.num_phases == least]
    if len(behind) == len(signs):
        return f"all ranks are alive in phase '{signs[0].phase}' and wait for one another"
    names = [_name(r, signs[r]) for r in behind[:8]]
    return f"the others wait for {', '.join(names)}"


def _stalled(before: list[Heartbeat], now: list[Heartbeat]) -> list[int]:
    """Ranks that showed no new sign; none if there is nothing to compare with."""
    both = zip(before, now, strict=False)
    return [r for r, (a, b) in enumerate(both) if a.num_beats == b.num_beats]


def _name(rank: int, sign: Heartbeat) -> str:
    return f"rank {rank} on {sign.host} in phase '{sign.phase}'"


def _key(rank: int) -> str:
    return f"sign-of-rank-{rank}"


def _common_store() -> dist.Store | None:
    """A store on rank 0's host; None for a single rank."""
    world_size = distributed.world_size()
    if world_size == 1:
        return None
    host, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
    is_main = distributed.is_main()
    store = None
    if is_main:
        store = dist.TCPStore(host, 0, world_size, True, patience, wait_for_workers=False)
    port = distributed.broadcast_object(store.port if store else 0)
    if store is None:
        store = dist.TCPStore(host, port, world_size, False, patience, wait_for_workers=False)
    return store
