"""The ranks' rendezvous, which says who did not come, and from which host."""

import base64
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scale_smog.errors import UserError

POLL_S = 0.05


def rendezvous(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """A store on rank 0's host that every rank has reached; a lone rank has its own.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout_s: how long to wait for the others.

    Raises:
        UserError: ranks are missing; names them and, where the launcher tells it, their hosts.
    """
    if world_size == 1:
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    is_server = rank == 0 and not is_served
    try:
        server = dist.TCPStore(
            host, port, world_size, is_server, timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except (RuntimeError, OSError) as error:
        _tell(rank, _unreachable(host, port, is_server, timeout_s))
        raise UserError(_unreachable(host, port, is_server, timeout_s)) from error
    # torchrun's store lives on when it starts the ranks anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"meeting-{attempt}", server)
    store.set(str(rank), socket.gethostname())
    if rank == 0:
        _await_all(store, world_size, timeout_s)
        store.set("all", "here")
    else:
        _await_word(store, timeout_s)
    return store


def _await_all(store: dist.Store, world_size: int, timeout_s: float) -> None:
    missing = list(range(world_size))
    end = time.monotonic() + timeout_s
    while missing := [rank for rank in missing if not store.check([str(rank)])]:
        if time.monotonic() > end:
            raise UserError(_absent(missing, timeout_s))
        time.sleep(POLL_S)


def _await_word(store: dist.Store, timeout_s: float) -> None:
    try:
        store.wait(["all"], timedelta(seconds=timeout_s + 10))
    except RuntimeError:  # rank 0 has said why
        raise UserError("the ranks did not all come") from None


def _absent(missing: list[int], timeout_s: float) -> str:
    hosts = _hosts_of_ranks()
    names = [f"rank {r} on {hosts[r]}" if r < len(hosts) else f"rank {r}" for r in missing[:8]]
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    return (
        f"{', '.join(names)}{more} did not come within {timeout_s:.0f} s"
        f"{f' (nodes: {nodes})' if nodes else ''}: is the host up, does ssh reach it, and does it "
        f"reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}?"
    )


def _unreachable(host: str, port: int, is_server: bool, timeout_s: float) -> str:
    me = socket.gethostname()
    if is_server:
        return f"rank 0 on {me} cannot listen on {host}:{port}: take another port"
    return (
        f"{me} has not reached rank 0 at {host}:{port} within {timeout_s:.0f} s: is that the "
        "first host's address, and is the port open?"
    )


def _tell(rank: int, text: str) -> None:
    if rank != 0:  # rank 0 will not hear of it
        print(f"error: {text}", file=sys.stderr, flush=True)


def _hosts_of_ranks() -> list[str]:
    """Host of every rank, where the launcher's command line holds them: DeepSpeed's; else none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return []
    option = "--world_info="
    encoded = next((w.removeprefix(option) for w in words if w.startswith(option)), "")
    try:
        slots = json.loads(base64.urlsafe_b64decode(encoded)) if encoded else {}
    except ValueError:
        return []
    return [host for host, ids in slots.items() for _ in ids]
