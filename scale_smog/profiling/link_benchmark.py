"""Measures collectives on the ranks at hand and puts them into a hardware description."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scale_smog import distributed
from scale_smog.profiling.communication_model import Points, fit_alpha_beta
from scale_smog.profiling.hardware import MICRO, Hardware, Link, Range
from scale_smog.profiling.timing import synchronize

SIZES = tuple(4**i for i in range(5, 13))  # bytes of a whole tensor: 1 KiB to 16 MiB
WORK_SIDE, WORKS = 768, 10  # of a matrix product: 10 ms of a CPU's core, 20 us of a GPU
LATENCY_SPREAD, BANDWIDTH_SPREAD = (0.8, 1.0, 1.5), (1.15, 1.0, 0.8)
Group = dist.ProcessGroup | None


def calibrated(machine: Hardware, device: torch.device) -> Hardware:
    """The machine with its links as measured between these ranks; a collective.

    Ranks of one node measure the node's link; ranks of several also the network's, as many at a
    time as a node has.
    """
    world_size, per_node = distributed.world_size(), distributed.ranks_per_node()
    if world_size == 1:
        return machine
    changes: dict[str, object] = {}
    if world_size > per_node:
        changes["gpus_per_node"] = per_node
    if per_node > 1:
        group = dist.new_subgroups(per_node)[0] if world_size > per_node else None
        latency_s, bytes_per_s, shares = measure_link(device, per_node, group)
        changes["node"] = _link(latency_s, bytes_per_s)
        changes["collective_shares"] = shares
    nodes = world_size // per_node
    if nodes > 1:
        latency_s, bytes_per_s, _ = measure_link(device, nodes, _across_nodes(per_node))
        changes["network"] = _link(latency_s / math.log2(nodes), bytes_per_s)
    return machine.model_copy(update=changes)


def measure_link(
    device: torch.device, ranks: int, group: Group
) -> tuple[float, float, dict[str, float]]:
    """Latency [s] and bandwidth [bytes/s] of a ring all-reduce, and the other kinds' shares of it.

    The same on every rank: the slowest one's.
    """
    points = {kind: measure(kind, device, ranks, group) for kind in COLLECTIVES}
    at_a_barrier_s, seconds_per_byte = fit_alpha_beta(points["all_reduce"])
    latency_s = max(at_a_barrier_s, latency_between_work(device, ranks, group))
    largest = {kind: seconds[-1][1] for kind, seconds in points.items()}
    shares = {kind: seconds / largest["all_reduce"] for kind, seconds in largest.items()}
    return latency_s, 2 * (ranks - 1) / ranks / seconds_per_byte, shares


def measure(kind: str, device: torch.device, ranks: int, group: Group, repeats: int = 7) -> Points:
    """Median seconds of a collective for each of SIZES."""
    points = []
    for size in SIZES:
        whole = torch.zeros(max(ranks, size // 4 // ranks * ranks), device=device)
        call = COLLECTIVES[kind](whole, ranks, group)
        seconds = []
        for _ in range(repeats + 1):  # the first sets up connections
            dist.barrier(group)
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(seconds[1:]), device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        points.append((whole.numel() * 4, slowest.item()))
    return points


def latency_between_work(device: torch.device, ranks: int, group: Group, rounds: int = 9) -> float:
    """Median seconds that a small all-reduce adds to what ranks compute between two of them.

    More than after a barrier: they do not arrive together, and find other things in the caches.
    """
    matrix = torch.randn(WORK_SIDE, WORK_SIDE, device=device)
    product, small = torch.empty_like(matrix), torch.zeros(256, device=device)

    def seconds_of(between: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(WORKS):
            torch.mm(matrix, matrix, out=product)
            between()
        synchronize(device)
        return (time.perf_counter() - start) / WORKS

    call = COLLECTIVES["all_reduce"](small, ranks, group)
    added = []
    for _ in range(rounds + 1):
        dist.barrier(group)
        alone = seconds_of(lambda: None)
        dist.barrier(group)
        added.append(seconds_of(call) - alone)
    slowest = torch.tensor(statistics.median(added[1:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _link(latency_s: float, bytes_per_s: float) -> Link:
    def spread(value: float, factors: Sequence[float]) -> Range:
        low, mid, high = (value * factor for factor in factors)
        return low, mid, high

    return Link(
        latency_us=spread(latency_s / MICRO, LATENCY_SPREAD),
        gb_per_s=spread(bytes_per_s / 1e9, BANDWIDTH_SPREAD),
    )


def _across_nodes(per_node: int) -> dist.ProcessGroup | None:
    """The ranks that have this one's place in their nodes."""
    own = None
    for place in range(per_node):
        group = dist.new_group(list(range(place, distributed.world_size(), per_node)))
        if isinstance(group, dist.ProcessGroup):
            own = group
    return own


def _all_reduce(whole: Tensor, ranks: int, group: Group) -> Callable[[], object]:
    return lambda: dist.all_reduce(whole, group=group)


def _all_gather(whole: Tensor, ranks: int, group: Group) -> Callable[[], object]:
    part = whole.chunk(ranks)[0].clone()
    return lambda: dist.all_gather_into_tensor(whole, part, group=group)


def _reduce_scatter(whole: Tensor, ranks: int, group: Group) -> Callable[[], object]:
    part = whole.chunk(ranks)[0].clone()
    return lambda: dist.reduce_scatter_tensor(part, whole, group=group)


COLLECTIVES: dict[str, Callable[[Tensor, int, Group], Callable[[], object]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}
