"""Latency and bandwidth of collectives and of links between hosts; slow links are named."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.preflight.table import Row
from scale_smog.profiling.communication_model import CommunicationModel, fit_alpha_beta
from scale_smog.profiling.hardware import MICRO, Hardware
from scale_smog.profiling.link_benchmark import measure
from scale_smog.profiling.timing import time_calls

REPEATS = 15
SMALL_BYTES, LARGE_BYTES = 64, 2**22
PESSIMISTIC = 2
TOLERANCE = 2.0  # times the hardware file's pessimistic value
OUTLIER = 3.0  # times the median of all links
# Where there is no hardware file, what any wired network of one room does.
MIN_BYTES_PER_S, MAX_LATENCY_S = 0.1e9, 1e-3
MIB = 2**20


class Link(NamedTuple):
    """Between two neighbouring hosts."""

    a: str
    b: str
    latency_s: float  # one way
    bytes_per_s: float

    def __str__(self) -> str:
        rate = f"{self.latency_s * 1e3:.2f} ms, {self.bytes_per_s / 1e9:.2f} GB/s"
        return f"{self.a} - {self.b}: {rate}"


def check_collectives(recipe: Recipe, device: torch.device, machine: Hardware | None) -> Row:
    """Times all-reduce, all-gather and the groups' update over all ranks; a collective.

    Args:
        recipe: for the size of the groups.
        device: of this rank.
        machine: what its hardware file says; None where it has none.
    """
    ranks = distributed.world_size()
    if ranks == 1:
        return Row("collectives", "one rank: none")
    numel = recipe.grouping.num_groups * (recipe.model.dim + 1)
    groups = torch.zeros(numel, device=device)
    group_s = statistics.median(time_calls(lambda: dist.all_reduce(groups), device, REPEATS))
    said, faults = [], []
    model = CommunicationModel(machine, PESSIMISTIC) if machine else None
    for kind in ("all_reduce", "all_gather"):
        points = measure(kind, device, ranks, None, REPEATS)
        latency_s, s_per_byte = fit_alpha_beta(points)
        said.append(f"{kind} {latency_s * 1e3:.2f} ms, {1e-9 / s_per_byte:.2f} GB/s")
        num_bytes, seconds = points[-1]
        faults += _compare_with_model(model, kind, num_bytes, seconds)
    said.append(f"the groups' {numel * 4 / MIB:.2f} MiB {group_s * 1e3:.2f} ms")
    faults += _compare_with_model(model, "all_reduce", numel * 4, group_s)
    said.append(f"expected of {machine.name}" if machine else "no hardware file to compare with")
    return Row("collectives", "; ".join(said), faults)


def _compare_with_model(
    model: CommunicationModel | None, kind: str, num_bytes: float, seconds: float
) -> list[str]:
    if model is None:
        return []
    expected = model.seconds(kind, num_bytes, distributed.world_size())
    if seconds <= TOLERANCE * expected:
        return []
    return [
        f"{kind} of {num_bytes / MIB:.1f} MiB takes {seconds * 1e3:.2f} ms, {model.machine.name} "
        f"{expected * 1e3:.2f} at worst: see the links, NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
    ]


def check_links(
    hosts: Sequence[str], leaders: Sequence[int], device: torch.device, machine: Hardware | None
) -> Row:
    """Sends between the first ranks of neighbouring hosts, in a ring; a collective.

    Args:
        hosts: names.
        leaders: the first rank of each.
        device: of this rank.
        machine: what its hardware file says; None where it has none.
    """
    if len(hosts) == 1:
        return Row("links", "one host: none")
    mine: dict[int, tuple[float, float]] = {}
    rounds = ring_rounds(len(hosts))
    for pairs in rounds:
        for number, (i, j) in pairs.items():
            if distributed.rank() in (leaders[i], leaders[j]):
                mine[number] = _measure_link(leaders[i], leaders[j], device)
        distributed.barrier()
    measured: dict[int, tuple[float, float]] = {}
    for each in distributed.gather_objects(mine):
        measured |= each
    ends = {number: pair for pairs in rounds for number, pair in pairs.items()}
    links = [Link(hosts[ends[n][0]], hosts[ends[n][1]], *measured[n]) for n in sorted(ends)]
    return find_slow_links(links, machine)


def find_slow_links(links: Sequence[Link], machine: Hardware | None) -> Row:
    """Names links that are slower than the machine's network, or than most others."""
    max_s, min_bytes_per_s = MAX_LATENCY_S, MIN_BYTES_PER_S
    if machine:
        max_s = TOLERANCE * machine.network.latency_us[PESSIMISTIC] * MICRO
        min_bytes_per_s = machine.network.gb_per_s[PESSIMISTIC] * 1e9 / TOLERANCE
    if len(links) > 2:
        max_s = min(max_s, OUTLIER * statistics.median(link.latency_s for link in links))
        median_rate = statistics.median(link.bytes_per_s for link in links)
        min_bytes_per_s = max(min_bytes_per_s, median_rate / OUTLIER)
    limits = f"at most {max_s * 1e3:.2f} ms, at least {min_bytes_per_s / 1e9:.2f} GB/s"
    faults = [
        f"slow link {link} ({limits})"
        for link in links
        if link.latency_s > max_s or link.bytes_per_s < min_bytes_per_s
    ]
    slowest = max(links, key=lambda link: link.latency_s)
    return Row("links", f"{len(links)} between hosts, the slowest {slowest}", faults)


def ring_rounds(num_hosts: int) -> list[dict[int, tuple[int, int]]]:
    """The pairs of a ring, in rounds in which no host is in two: number of the pair -> its ends."""
    ring = [(i, (i + 1) % num_hosts) for i in range(num_hosts if num_hosts > 2 else 1)]
    rounds = [dict(list(enumerate(ring))[start::2]) for start in (0, 1)]
    if num_hosts > 2 and num_hosts % 2:  # the last pair would meet the first
        rounds[0].pop(num_hosts - 1)
        rounds.append({num_hosts - 1: ring[-1]})
    return rounds


def _measure_link(a: int, b: int, device: torch.device) -> tuple[float, float]:
    """Latency [s] of a message and bandwidth [bytes/s] between two ranks."""
    small_s, large_s = (_round_trip_s(a, b, size, device) for size in (SMALL_BYTES, LARGE_BYTES))
    return small_s / 2, 2 * LARGE_BYTES / max(large_s - small_s, 1e-9)


def _round_trip_s(a: int, b: int, num_bytes: int, device: torch.device) -> float:
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    first, second = (dist.send, dist.recv) if distributed.rank() == a else (dist.recv, dist.send)
    other = b if distributed.rank() == a else a

    def exchange() -> None:
        first(message, other)
        second(message, other)

    # A busy host is slow at times, a slow link always.
    return min(time_calls(exchange, device, REPEATS))
