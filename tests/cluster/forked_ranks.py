"""Many gloo ranks on one machine, forked from a process that has imported everything.

What was imported is shared until it is written, so a rank costs about 100 MB instead of 700. The
parent watches the machine's free memory and ends the ranks, and only those, before it runs out.
"""

import ctypes
import gc
import importlib
import mmap
import os
import re
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from ports import free_port

PRELOADED = (
    "scale_smog.pretrain",
    "scale_smog.engine.ddp",
    "scale_smog.engine.fsdp",
    "scale_smog.engine.zero",
    "scale_smog.evaluation.program",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
)
MIN_FREE_GIB = 4.0
PR_SET_PDEATHSIG = 1  # of Linux
POLL_S = 0.1
GRACE_S = 20.0  # for the others, when a rank has failed, as a launcher would


class OutOfMemory(Exception):
    """The machine had less than MIN_FREE_GIB left: all ranks have been ended."""


def free_gib() -> float:
    """Memory that a new process could have."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found
    return int(found.group(1)) / 2**20


def preload() -> None:
    """Imports what ranks need; call it once, before the first fork."""
    import torch

    torch.set_num_threads(1)  # a thread pool would not survive the fork
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what the collector does not touch stays shared


@dataclass
class ForkedRanks:
    """A job of ranks on pretended nodes.

    Args:
        folder: for the ranks' consoles.
        world_size: number of ranks.
        per_node: ranks of a node.
        work: what a rank does, with its number.
    """

    folder: Path
    world_size: int
    per_node: int
    work: Callable[[int], object]
    pids: dict[int, int] = field(default_factory=dict)  # of ranks that run
    codes: dict[int, int] = field(default_factory=dict)  # of ranks that have ended
    seconds: float = 0.0
    peak_gib: float = 0.0

    def start(self, counted: bool = False) -> None:
        """Forks all ranks, in a process group of their own.

        Args:
            counted: the others reach rank 0's store through `self.store`, which counts.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._free_gib, self._start = free_gib(), time.monotonic()
        self._start_guard()
        port = free_port()
        self.store = CountingProxy(port)
        proxy_port = self.store.start() if counted else port
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(self.world_size):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self._guard)
                os.close(self._alive)
                self._run_rank(rank, port if rank == 0 else proxy_port)
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, self._guard)  # whoever is first
            self.pids[rank] = pid

    def _start_guard(self) -> None:
        """Forks the leader of the ranks' process group, which kills the group when we are gone.

        A rank's own processes are in the group too: its forkserver does not hear SIGTERM, and the
        forkserver's workers do not notice that the rank has been killed.
        """
        gone, self._alive = os.pipe()
        self._guard = os.fork()
        if self._guard == 0:
            os.setpgid(0, 0)
            os.close(self._alive)
            os.read(gone, 1)  # returns when nobody holds the other end any more
            os.killpg(0, signal.SIGKILL)
        os.close(gone)
        with suppress(PermissionError):
            os.setpgid(self._guard, self._guard)  # whoever is first

    def _run_rank(self, rank: int, port: int) -> None:
        code = 1
        try:
            log = os.open(self.console(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._enter_environment(rank, port)
            self.work(rank)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _enter_environment(self, rank: int, port: int) -> None:
        node = rank // self.per_node
        socket.gethostname = lambda: f"node-{node}"
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % self.per_node),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(min(self.per_node, self.world_size)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }

    def console(self, rank: int) -> Path:
        """What a rank says before and after it has its own log."""
        return self.folder / f"console-{rank:05d}.log"

    def said(self) -> str:
        """All consoles, rank by rank, without what torch's C++ logs."""
        logs = sorted(self.folder.glob("console-*.log"))
        lines = "".join(log.read_text(errors="replace") for log in logs).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[W"))

    def poll(self) -> bool:
        """Whether ranks still run; notes who has ended.

        Raises:
            OutOfMemory: too little is left, and all ranks have been ended.
        """
        for rank, pid in list(self.pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._note(rank, status)
        free = free_gib()
        self.peak_gib = max(self.peak_gib, self._free_gib - free)
        self.seconds = time.monotonic() - self._start
        if free < MIN_FREE_GIB and self.pids:
            self.end()
            raise OutOfMemory(f"{free:.1f} GiB left")
        return bool(self.pids)

    def wait(self, timeout_s: float) -> dict[int, int]:
        """Exit codes, negative those of signals; who is left when time is over is killed.

        A rank that fails takes the others with it after a while.
        """
        end = time.monotonic() + timeout_s
        has_failed = False
        while self.poll() and time.monotonic() < end:
            time.sleep(POLL_S)
            if not has_failed and any(self.codes.values()):
                has_failed, end = True, min(end, time.monotonic() + GRACE_S)
        self.end()
        return self.codes

    def end(self) -> None:
        """Kills what is left of the ranks and of their own processes."""
        self.store.end()
        if not self._guard:
            return
        os.killpg(self._guard, signal.SIGKILL)
        for rank, pid in list(self.pids.items()):
            self._note(rank, os.waitpid(pid, 0)[1])
        os.waitpid(self._guard, 0)
        os.close(self._alive)
        self._guard = 0

    def _note(self, rank: int, status: int) -> None:
        self.codes[rank] = os.waitstatus_to_exitcode(status)
        del self.pids[rank]


class CountingProxy:
    """Stands before a port of this machine and counts what clients send, in a process of its own.

    Args:
        port: of the server.
    """

    def __init__(self, port: int):
        self._port, self._pid = port, 0
        self._counts = mmap.mmap(-1, 16)  # shared with the process: messages, bytes

    def start(self) -> int:
        """Returns the port that clients take."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                self._forward(listener)
            finally:
                os._exit(1)
        port = listener.getsockname()[1]
        listener.close()
        return port

    def _forward(self, listener: socket.socket) -> None:
        selector, other = selectors.DefaultSelector(), {}
        selector.register(listener, selectors.EVENT_READ, None)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    client, _ = listener.accept()
                    server = self._connect()
                    for end, is_client in ((client, True), (server, False)):
                        selector.register(end, selectors.EVENT_READ, is_client)
                    other |= {client: server, server: client}
                    continue
                sender: Any = key.fileobj
                message = sender.recv(2**20)
                if not message:
                    for end in (sender, other[sender]):
                        with suppress(KeyError):
                            selector.unregister(end)
                        end.close()
                    continue
                other[sender].sendall(message)
                if key.data:
                    self._add(len(message))

    def _connect(self) -> socket.socket:
        while True:  # the server may have yet to come
            with suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self._port))
            time.sleep(0.05)

    def _add(self, num_bytes: int) -> None:
        counts = self.num_messages + 1, self.num_bytes + num_bytes
        self._counts[:] = struct.pack("qq", *counts)

    @property
    def num_messages(self) -> int:
        """That clients have sent."""
        return struct.unpack("qq", self._counts)[0]

    @property
    def num_bytes(self) -> int:
        """That clients have sent."""
        return struct.unpack("qq", self._counts)[1]

    def end(self) -> None:
        """Ends the process."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
