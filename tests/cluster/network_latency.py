"""A wire between two hosts on which every packet takes longer, for kernels without tc's netem.

Each host gets a TUN device; this process carries packets from one to the other, late.
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

DEVICE, MTU = "wire0", 9000
ADDRESSES = ("10.77.42.1", "10.77.42.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000


@contextmanager
def network_latency(hosts: Sequence[Host], delay_s: float) -> Iterator[None]:
    """For a while the hosts' names stand for addresses on a wire with that latency, one way."""
    command = [sys.executable, __file__, *(str(host.pid) for host in hosts), str(delay_s)]
    carrier = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert carrier.stdout and carrier.stdout.readline() == "ready\n"
    names = "".join(f"{a} {host.name}\n" for a, host in zip(ADDRESSES, hosts, strict=True))
    try:
        for host in hosts:
            host.sh(f"cp /etc/hosts /etc/hosts.before && printf '{names}' > /etc/hosts")
        yield
    finally:
        for host in hosts:
            host.sh("mv /etc/hosts.before /etc/hosts")
        carrier.kill()
        carrier.wait()


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


def carry(a: int, b: int, delay_s: float) -> None:
    """Carries packets between two devices for ever."""
    other = {a: b, b: a}
    on_the_way: deque[tuple[float, int, bytes]] = deque()  # when to arrive, where, what
    while True:
        patience = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for device in select.select([a, b], [], [], patience)[0]:
            packet = os.read(device, MTU + 64)
            on_the_way.append((time.monotonic() + delay_s, other[device], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, device, packet = on_the_way.popleft()
            os.write(device, packet)


if __name__ == "__main__":
    first, second, delay = sys.argv[1:]
    devices = [
        open_device(int(pid), address)
        for pid, address in zip((first, second), ADDRESSES, strict=True)
    ]
    # Ahead of what it connects: a wire does not wait for a processor.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    carry(*devices, float(delay))
