"""Ports for what tests start."""

import fcntl
import os
import socket
from pathlib import Path

# Below those that Linux gives to outgoing connections (32768 and up). Of those, a stranger may get
# one that was free when a test chose it and that its launcher comes to use half a minute later.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """One that nobody listens on; all test processes of this machine are given different ones."""
    counter = Path(f"/tmp/scale_smog_test_port-{os.getuid()}")
    with open(counter, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or 1009 * os.getuid())
        while not _is_free(port := PORTS[number % len(PORTS)]):
            number += 1
        file.truncate(0)
        file.write(str(number + 1))
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
