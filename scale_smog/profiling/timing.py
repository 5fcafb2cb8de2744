"""Seconds of calls on a device that works after the host has gone on."""

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked to; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
