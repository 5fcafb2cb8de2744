"""Traces of a few steps for TensorBoard, and what they say of communication."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scale_smog.profiling.step_profile import RANGE, Communication

Intervals = list[tuple[float, float]]  # disjoint and in order


def tracing(device: torch.device) -> profile:
    """A profiler of the host and, where there is one, the GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def write_trace(profiler: profile, folder: Path, rank: int) -> Path:
    """Writes a trace that TensorBoard's profiler plugin, Perfetto and chrome://tracing read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{rank}.pt.trace.json"
    profiler.export_chrome_trace(str(path))
    return path


def communication(profiler: profile, on_gpu: bool) -> dict[str, Communication]:
    """Shares of each part that communication took: exposed, and hidden behind computation.

    Communication is exposed while a collective is under way and nothing is computed: no kernel
    runs on the GPU, no operation on the CPU.
    """
    events = [e for e in profiler.events() or [] if _is_on(e, on_gpu)]
    sent = union((e.time_range.start, e.time_range.end) for e in events if _is_collective(e.name))
    busy = union(
        (e.time_range.start, e.time_range.end) for e in events if _is_computation(e, on_gpu)
    )
    exposed, hidden = minus(sent, busy), intersection(sent, busy)
    ranges: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.name.startswith(RANGE):
            span = (event.time_range.start, event.time_range.end)
            ranges.setdefault(event.name.removeprefix(RANGE), []).append(span)
    shares = {}
    for name, spans in ranges.items():
        within = union(spans)
        total = length(within)
        if name != "other" and total:  # `other` encloses the parts
            shares[name] = Communication(
                length(intersection(exposed, within)) / total,
                length(intersection(hidden, within)) / total,
            )
    return shares


def _is_on(event: Any, on_gpu: bool) -> bool:
    is_gpu_event = event.device_type == torch.autograd.DeviceType.CUDA
    return is_gpu_event == on_gpu


def _is_collective(name: str) -> bool:
    return name.startswith(("gloo:", "nccl")) and "send" not in name and "recv" not in name


def _is_computation(event: Any, on_gpu: bool) -> bool:
    if on_gpu:  # kernels and copies, and not the ranges that enclose them
        return not (event.is_user_annotation or event.name.startswith((RANGE, "nccl")))
    return event.name.startswith("aten::")


def union(spans: Iterable[tuple[float, float]]) -> Intervals:
    """The spans joined where they meet."""
    joined: Intervals = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """Where both are."""
    common: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def minus(a: Intervals, b: Intervals) -> Intervals:
    """Where `a` is and `b` is not."""
    left: Intervals = []
    for start, end in a:
        for other_start, other_end in b:
            if other_end <= start or other_start >= end:
                continue
            if other_start > start:
                left.append((start, other_start))
            start = max(start, other_end)
        if start < end:
            left.append((start, end))
    return left


def length(spans: Sequence[tuple[float, float]]) -> float:
    """Of all together."""
    return sum(end - start for start, end in spans)
