"""Adds latency to the link between two hosts, for kernels without tc's netem.

Each host gets a TUN device; this process forwards packets from one to the other, late.
"""

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hosts import Host

DEVICE, MTU = "delayed0", 9000
ADDRESSES = ("10.77.42.1", "10.77.42.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000


@contextmanager
def network_latency(hosts: Sequence[Host], delay_s: float) -> Iterator[None]:
    """For a while the hosts' names stand for addresses on a link with that one-way latency."""
    command = [sys.executable, __file__, *(str(host.pid) for host in hosts), str(delay_s)]
    forwarder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert forwarder.stdout and forwarder.stdout.readline() == "ready\n"
    names = "".join(f"{a} {host.name}\n" for a, host in zip(ADDRESSES, hosts, strict=True))
    try:
        for host in hosts:
            host.sh(f"cp /etc/hosts /etc/hosts.before && printf '{names}' > /etc/hosts")
        yield
    finally:
        for host in hosts:
            host.sh("mv /etc/hosts.before /etc/hosts")
        forwarder.kill()
        forwarder.wait()


def open_device(pid: int, address: str) -> int:
    """A TUN device in the network of a process; returns its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if libc.setns(network, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for words in (f"address add {address}/24 dev {DEVICE}", f"link set {DEVICE} up mtu {MTU}"):
        subprocess.run(["ip", *words.split()], check=True)
    return device


def forward(a: int, b: int, delay_s: float) -> None:
    """Forwards packets between two devices for ever."""
    other = {a: b, b: a}
    in_flight: deque[tuple[float, int, bytes]] = deque()  # when to arrive, where, what
    while True:
        patience = max(0.0, in_flight[0][0] - time.monotonic()) if in_flight else None
        for device in select.select([a, b], [], [], patience)[0]:
            packet = os.read(device, MTU + 64)
            in_flight.append((time.monotonic() + delay_s, other[device], packet))
        while in_flight and in_flight[0][0] <= time.monotonic():
            _, device, packet = in_flight.popleft()
            os.write(device, packet)


if __name__ == "__main__":
    first, second, delay = sys.argv[1:]
    devices = [
        open_device(int(pid), address)
        for pid, address in zip((first, second), ADDRESSES, strict=True)
    ]
    # Above what it connects: a link does not wait for a processor.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    forward(*devices, float(delay))
