"""Faults of a cluster: how each is injected on the second host, and what a check must print.

A host's mounts are its own, so what is laid over a file there is not seen anywhere else.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import NamedTuple

from hosts import Host

HOST = "host-b"
FAKETIME = next(iter(glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)


def _over_the_data(name: str, change: str) -> str:
    """A copy of the dataset of the host's own, changed, in the dataset's place."""
    copy = "{scratch}/" + name
    change = change.format(copy=copy)
    return f"cp -r {{data}} {copy} && {change} && mount --bind {copy} {{data}}"


class Fault(NamedTuple):
    """Two scripts for a host's shell, and the pattern of the line that a check prints."""

    inject: str
    remove: str
    pattern: str


FAULTS = {
    "another package version": Fault(
        "sed 's/^Version: .*/Version: 9.9.9/' {metadata} > {scratch}/metadata && "
        "mount --bind {scratch}/metadata {metadata}",
        "umount {metadata}",
        rf"{HOST} has timm 9\.9\.9, host-a has ",
    ),
    "missing shard": Fault(
        _over_the_data("lacking", "rm {copy}/train-000001.tar"),
        "umount {data}",
        rf"{HOST}: train-000001\.tar is missing",
    ),
    "changed shard": Fault(
        _over_the_data(
            "changed", "printf x | dd of={copy}/train-000002.tar bs=1 seek=700 conv=notrunc"
        ),
        "umount {data}",
        rf"{HOST}: train-000002\.tar is changed",
    ),
    "read-only run folder": Fault(
        "mount --bind {run} {run} && mount -o remount,ro,bind {run}",
        "umount {run}",
        rf"on {HOST}: .*Read-only file system",
    ),
    "full disk": Fault(
        "mount -t tmpfs -o size=512k tmpfs {run}",
        "umount {run}",
        rf"on {HOST}: .*No space left on device",
    ),
    "wrong clock": Fault(
        f"echo +2h > /etc/faketimerc && echo {FAKETIME} > /etc/ld.so.preload",
        "rm /etc/ld.so.preload",
        rf"{HOST}'s clock is 7\d\d\d s ahead",
    ),
    "slow link": Fault(
        "tc qdisc add dev eth0 root netem delay 5ms 2>/dev/null || "  # not in every kernel
        "tc qdisc add dev eth0 root tbf rate 200mbit burst 64kb latency 400ms",
        "tc qdisc del dev eth0 root",
        rf"slow link host-a - {HOST}",
    ),
    "unreachable host": Fault(
        "ip link set eth0 down",
        "ip link set eth0 up",
        r"rank 1 did not come within \d+ s, ranks came from host-a \(1\)",
    ),
}


@contextmanager
def injected(host: Host, names: list[str], data: Path, run: Path) -> Iterator[None]:
    """Faults on a host, for a while.

    Args:
        host: the one with the faults.
        names: of FAULTS; where two replace the same folder, the second lies over the first.
        data: the dataset's folder.
        run: the run's folder.
    """
    timm = importlib.metadata.distribution("timm")
    places = {
        "scratch": host.folder / "scratch",
        "data": data,
        "run": run,
        "metadata": timm.locate_file(f"timm-{timm.version}.dist-info/METADATA"),
    }
    done: list[str] = []
    try:
        for name in names:
            host.sh(FAULTS[name].inject.format(**places))
            done.insert(0, name)
        yield
    finally:
        for name in done:
            host.sh(FAULTS[name].remove.format(**places))
