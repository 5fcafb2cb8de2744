"""The rendezvous of all ranks on rank 0's host, which names the ranks that do not come."""

import os
import socket
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue

import torch.distributed as dist

from scale_smog.errors import CommonError, RankError, UserError, first_few

EXTRA_WAIT_S = 10.0  # of the other ranks, so that rank 0 says first who is missing
LEAVING_S, HEARING_S = 3.0, 1.0  # to tell the others that a rank leaves, and for them to hear it
COMPLETE, LEFT = b"complete", b"left by "


def rendezvous(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """A store on rank 0's host that every rank has reached; a lone rank has its own.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout_s: how long to wait for the others.

    Raises:
        UserError: ranks are missing; names them and the hosts of those that came.
        SystemExit: with status 0; a rank has left, as it was told to.
    """
    if world_size == 1:
        return dist.HashStore()
    server = _connect(rank, world_size, timeout_s)
    if rank == 0:
        return _open_round(server, world_size, timeout_s)
    return _join_round(server, rank, world_size, timeout_s)


def leave_rendezvous() -> None:
    """Tells ranks that wait for others that this one will not wait: the job ends with it.

    May be called from any thread; does nothing where all have met. torchrun's agents end and
    restart ranks by signals, and keep the store: there nothing is said.
    """
    if _is_served_by_agent() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    address, timeout = _address(), timedelta(seconds=LEAVING_S)
    with suppress(RuntimeError, OSError):  # rank 0 has yet to come, or has gone
        store = _round(dist.TCPStore(*address, timeout=timeout, wait_for_workers=False), 1)
        word = _word_of_leaving()
        if store.compare_set("outcome", "", word.decode()) == word:
            store.set("all", "")
            time.sleep(HEARING_S)  # the store may be this process's


def _word_of_leaving() -> bytes:
    return LEFT + f"rank {os.environ['RANK']} on {socket.gethostname()}".encode()


def _connect(rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    host, port = _address()
    is_server = rank == 0 and not _is_served_by_agent()
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, world_size, is_server, timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        kind = RankError if is_first_here else CommonError
        raise kind(_unreachable(host, port, is_server, timeout_s)) from error


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _is_served_by_agent() -> bool:
    """Whether the store is torchrun's own."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# torchrun's store outlives the ranks, and each of its agents counts restarts for itself. What all
# ranks share is the store: rank 0 counts the rounds there. A process that finds its own place in a
# round taken, or the round given up, goes on to the next one.


def _open_round(server: dist.Store, world_size: int, timeout_s: float) -> dist.Store:
    """Rank 0: begins a round and waits for all ranks to come to it."""
    number = server.add("num_rounds", 1)
    store = _round(server, number)
    store.set("open", "")
    _round(server, number - 1).set("outcome", "given up")
    _arrive(store, 0, world_size)
    if not _has_come(store, "all", timeout_s):
        raise UserError(_missing(store, world_size, timeout_s))
    outcome = store.compare_set("outcome", "", COMPLETE.decode())
    if outcome.startswith(LEFT):
        mate = outcome.removeprefix(LEFT).decode()
        said = "stopped before all ranks had met, as was"
        print(f"{said} {mate}; the same command resumes from there", flush=True)
        time.sleep(HEARING_S)
        raise SystemExit(0)
    return store


def _join_round(server: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Other ranks: come to the newest round that becomes complete."""
    number = max(1, server.add("num_rounds", 0))
    while True:
        store = _round(server, number)
        _await(store, "open", rank, timeout_s)
        if _arrive(store, rank, world_size):
            _await(store, "outcome", rank, timeout_s)
            outcome = store.get("outcome")
            if outcome == COMPLETE:
                return store
            if outcome.startswith(LEFT):
                if outcome == _word_of_leaving():  # its thread ends it when all have heard
                    time.sleep(LEAVING_S + HEARING_S)
                raise SystemExit(0)  # rank 0 says it
        number += 1


def _await(store: dist.Store, key: str, rank: int, timeout_s: float) -> None:
    if not _has_come(store, key, timeout_s + EXTRA_WAIT_S):
        kind = RankError if rank == 1 else CommonError  # rank 0 has said more, if it has come
        raise kind(f"rank 0 did not complete the rendezvous in {timeout_s:.0f} s")


def _has_come(store: dist.Store, key: str, timeout_s: float) -> bool:
    """Waits for a key, on a thread: the main one goes on to hear signals."""
    answers: SimpleQueue[bool] = SimpleQueue()

    def wait() -> None:
        try:
            store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError:  # time is over, or rank 0 is gone
            answers.put(False)
        else:
            answers.put(True)

    threading.Thread(target=wait, daemon=True).start()
    return answers.get()


def _round(server: dist.Store, number: int) -> dist.Store:
    return dist.PrefixStore(f"round-{number}", server)


def _arrive(store: dist.Store, rank: int, world_size: int) -> bool:
    """Takes a rank's place in a round; False if another process has had it."""
    name = f"{socket.gethostname()} {uuid.uuid4()}".encode()
    if store.compare_set(_place(rank), "", name.decode()) != name:
        return False
    if store.add("num_arrived", 1) == world_size:
        store.set("all", "")
    return True


def _place(rank: int) -> str:
    return f"rank-{rank}"


def _missing(store: dist.Store, world_size: int, timeout_s: float) -> str:
    here = [r for r in range(world_size) if store.check([_place(r)])]
    absent = sorted(set(range(world_size)) - set(here))
    hosts = Counter(store.get(_place(r)).decode().split()[0] for r in here)
    came = [f"{host} ({num})" for host, num in hosts.items()]
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    return (
        f"{first_few([f'rank {r}' for r in absent])} did not come within {timeout_s:.0f} s, "
        f"ranks came from {first_few(came)}{f' of {nodes}' if nodes else ''}: is every host up, "
        "does ssh reach it, and does it reach "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}?"
    )


def _unreachable(host: str, port: int, is_server: bool, timeout_s: float) -> str:
    me = socket.gethostname()
    if is_server:
        return f"rank 0 on {me} cannot listen on {host}:{port}: take another port"
    return (
        f"{me} has not reached rank 0 at {host}:{port} within {timeout_s:.0f} s: is that the "
        "first host's address, and is the port open?"
    )
