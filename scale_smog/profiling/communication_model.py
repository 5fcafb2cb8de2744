"""The alpha-beta model of communication, and what a step waits for by it.

A collective takes alpha + beta x bytes (Hockney, Parallel Computing 20, 1994): the latency and the
inverse bandwidth of a ring. Collectives over nodes are hierarchical: reduce-scatter within a node,
all-reduce between nodes of what each of its GPUs then holds, all-gather within the node. What the
backward pass hides is found by sending each bucket when its last gradient is ready.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from scale_smog.config import ZERO_BUCKET_NUMEL
from scale_smog.profiling.hardware import MICRO, Hardware, Link
from scale_smog.profiling.sharding import shards_of
from scale_smog.profiling.workload import Parts, Workload

DDP_FIRST_BUCKET, DDP_BUCKET = 2**20, 25 * 2**20  # bytes, torch's defaults
PREFETCH_BUCKET_NUMEL = 50_000_000  # weights that DeepSpeed's ZeRO-3 gathers at once, its default
COMPUTE_PARTS = ("online_forward", "momentum_forward", "backward")
Points = Sequence[tuple[int, float]]  # bytes, seconds


class CommunicationModel:
    """Seconds of collectives on a machine, by one estimate.

    Args:
        machine: alpha and beta of its links.
        estimate: 0 optimistic, 1 nominal, 2 pessimistic.
    """

    def __init__(self, machine: Hardware, estimate: int):
        self.machine, self.estimate, self._at = machine, estimate, machine.at(estimate)
        self.overlap = self._at(machine.overlap)

    def seconds(self, kind: str, num_bytes: float, ranks: int, messages: int = 1) -> float:
        """Of collectives over `ranks` neighbouring GPUs.

        Args:
            kind: `all_reduce`, `all_gather` or `reduce_scatter`.
            num_bytes: of the whole tensors together.
            ranks: that take part.
            messages: collectives that share the bytes.
        """
        if ranks == 1:
            return 0.0
        machine = self.machine
        in_node = min(ranks, machine.gpus_per_node)
        nodes = math.ceil(ranks / in_node)
        alpha = transfer = 0.0
        if in_node > 1:
            alpha += self._at(machine.node.latency_us) * MICRO
            transfer += self._ring_s(machine.node, num_bytes, in_node)
        if nodes > 1:
            alpha += self._at(machine.network.latency_us) * MICRO * math.log2(nodes)
            transfer += self._ring_s(machine.network, num_bytes / in_node, nodes)
        return messages * alpha + transfer * machine.collective_shares[kind]

    def between_nodes(self) -> "CommunicationModel":
        """Of one GPU of each node with one another."""
        return CommunicationModel(
            self.machine.model_copy(update={"gpus_per_node": 1}), self.estimate
        )

    def _ring_s(self, link: Link, num_bytes: float, ranks: int) -> float:
        """beta x bytes of an all-reduce (Patarasuk and Yuan, JPDC 69, 2009)."""
        return 2 * (ranks - 1) / ranks * num_bytes / (self._at(link.gb_per_s) * 1e9)

    def exposed_s(self, sent_s: float, least_s: float) -> float:
        """What is left of communication during a pass that would leave `least_s` at best."""
        return max((1 - self.overlap) * sent_s, least_s)


def fit_alpha_beta(points: Points) -> tuple[float, float]:
    """alpha [s] and beta [s/byte] of measured times, by least squares of the relative error."""
    num_bytes, seconds = np.array(points).T
    beta, alpha = np.polyfit(num_bytes, seconds, 1, w=1 / seconds)
    return max(float(alpha), 1e-7), max(float(beta), 1e-13)


def exposed_s(
    work: Workload, parts: Parts, gpus: int, engine: str, scope: str | int, machine: Hardware,
    estimate: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds that a step waits for the other ranks, by cause; all 0 on one GPU."""
    if gpus == 1:
        return {"weights": 0.0, "batch_norm": 0.0, "groups": 0.0}
    model = CommunicationModel(machine, estimate)
    return {
        "weights": _weights_s(work, parts, gpus, engine, model),
        "batch_norm": _batch_norm_s(work, parts, gpus, engine, scope, model),
        "groups": _groups_s(work, gpus, model),
    }


def finish_s(sent: Sequence[tuple[float, float]]) -> float:
    """When the last of messages (ready, seconds) is through, sent one at a time and in order."""
    free = 0.0
    for ready_s, seconds in sent:
        free = max(free, ready_s) + seconds
    return free


def _groups_s(work: Workload, gpus: int, model: CommunicationModel) -> float:
    """The groups' sums and their gradients, and k-means spread over the steps."""
    recipe, grouping = work.recipe, work.recipe.grouping
    num_bytes = 4.0 * grouping.num_groups * (recipe.model.dim + 1)
    seconds = 0.0
    if recipe.method.has_bank:
        seconds += 2 * model.seconds("all_reduce", num_bytes, gpus)
    if recipe.kmeans_every:
        rounds = grouping.kmeans_iterations / recipe.kmeans_every
        seconds += rounds * model.seconds("all_reduce", 2 * num_bytes, gpus)
    return seconds


def _weights_s(
    work: Workload, parts: Parts, gpus: int, engine: str, model: CommunicationModel
) -> float:
    """What the exchange of gradients and weights adds to a step."""
    if engine in ("ddp", "zero1", "zero2"):
        return _whole_weights_s(work, parts, gpus, engine, model)
    return _split_weights_s(work, parts, gpus, engine, model)


def _whole_weights_s(
    work: Workload, parts: Parts, gpus: int, engine: str, model: CommunicationModel
) -> float:
    """Of engines that hold whole weights: buckets of gradients, while the backward pass runs.

    DeepSpeed sums the buckets of zero2 on all ranks too, and each keeps its part.
    """
    sent = [
        (ready_s, model.seconds("all_reduce", num_bytes, gpus))
        for ready_s, num_bytes in _buckets(work, parts["backward"], engine)
    ]
    total = sum(seconds for _, seconds in sent)
    if engine == "ddp":
        return model.exposed_s(total, finish_s(sent) - parts["backward"])
    # DeepSpeed waits for its buckets, and for the new weights after the optimizer.
    weights_s = model.seconds("all_gather", 4.0 * work.num_weights, gpus)
    return total + weights_s + _norms_s(work, gpus, model)


def _split_weights_s(
    work: Workload, parts: Parts, gpus: int, engine: str, model: CommunicationModel
) -> float:
    """Of engines that split them: they are gathered for every pass, gradients are scattered."""
    gradients, weights = work.num_weights * _grad_bytes(work, engine), work.num_weights * 4.0
    config, nets = work.recipe.engine, work.recipe.nets
    shards = shards_of(engine, gpus, model.machine.gpus_per_node).weights
    if engine == "zero3":  # weights stay from a pass forward to its pass backward
        num_passes = 1 + nets.num_momentum_views
        messages = math.ceil(work.num_weights / PREFETCH_BUCKET_NUMEL)
    else:
        num_sizes = nets.num_online_views + (1 if work.recipe.data.num_small_crops else 0)
        num_passes = (config.num_online_forwards + 1) * num_sizes + nets.num_momentum_views
        messages = work.cost.num_units
    num_gathers = config.accumulate * num_passes
    sent_s = num_gathers * model.seconds("all_gather", weights, shards, messages)
    sent_s += model.seconds("reduce_scatter", gradients, shards, messages)
    # A part is copied into the message and the whole out of it; gradients likewise.
    copied = 2 * (1 + 1 / shards) * (num_gathers * weights + gradients)
    sent_s += copied / model.machine.bytes_per_s
    if gpus > shards:  # hsdp: the nodes' copies add up their parts
        copies = model.between_nodes()
        sent_s += copies.seconds("all_reduce", gradients / shards, gpus // shards, messages)
    compute = sum(parts[name] for name in COMPUTE_PARTS)
    return model.exposed_s(sent_s, sent_s - compute) + _norms_s(work, shards, model)


def _norms_s(work: Workload, ranks: int, model: CommunicationModel) -> float:
    """Of LARS: two norms a layer."""
    return model.seconds("all_reduce", 8.0 * len(work.cost.ready), ranks)


def _batch_norm_s(
    work: Workload, parts: Parts, gpus: int, engine: str, scope: str | int,
    model: CommunicationModel,
) -> float:  # fmt: skip
    """One all-gather a batch norm and pass, one all-reduce in the backward pass.

    Where nets are whole the two forward passes run at the same time, and one net's messages hide
    behind what the other computes.
    """
    cost, accumulate = work.cost, work.recipe.engine.accumulate
    sizes = {"global": gpus, "node": min(gpus, model.machine.gpus_per_node), "local": 1}
    ranks = min(gpus, sizes.get(str(scope), int(scope) if str(scope).isdigit() else 1))

    def gathered_s(channels: Sequence[int]) -> float:
        each = (model.seconds("all_gather", 8.0 * c * ranks, ranks) for c in channels)
        return accumulate * sum(each)

    online_s, momentum_s = gathered_s(cost.norm_channels), gathered_s(cost.momentum_norm_channels)
    seconds = online_s + momentum_s
    if shards_of(engine, gpus, model.machine.gpus_per_node).weights == 1:
        beside = (online_s - parts["momentum_forward"], momentum_s - parts["online_forward"])
        seconds = model.exposed_s(seconds, max(0.0, *beside))
    seconds += work.num_repeats * online_s
    seconds += accumulate * sum(
        model.seconds("all_reduce", 8.0 * c, ranks) for c in cost.norm_channels
    )
    if ranks < gpus:  # running statistics are averaged at the end of the step
        channels = sum(cost.norm_channels) + sum(cost.momentum_norm_channels)
        seconds += model.seconds("all_reduce", 8.0 * channels, gpus)
    return seconds


def _grad_bytes(work: Workload, engine: str) -> int:
    """That a weight's gradient takes on the wire at a step."""
    config = work.recipe.engine
    value_bytes = 2 if config.reduce_precision == "bf16" else 4
    # These share the gradients of every micro-batch.
    return value_bytes * config.accumulate if engine in ("zero2", "zero3") else value_bytes


def _buckets(work: Workload, backward_s: float, engine: str) -> Iterator[tuple[float, float]]:
    """When each bucket of gradients is full, seconds into the backward pass, and its bytes."""
    value_bytes = _grad_bytes(work, engine)
    num_ops = max(1, len(work.cost.backward))
    # Of the last micro-batch, in which the ranks share their gradients.
    last_s = backward_s * num_ops / (num_ops + len(work.repeated_forward))
    last_s /= work.recipe.engine.accumulate
    limit = DDP_FIRST_BUCKET if engine == "ddp" else ZERO_BUCKET_NUMEL * value_bytes
    filled = 0.0
    for ready in work.cost.ready:
        filled += ready.numel * value_bytes
        if filled >= limit:
            yield backward_s - last_s * (1 - ready.num_ops / num_ops), filled
            filled, limit = 0.0, DDP_BUCKET if engine == "ddp" else limit
    if filled:
        yield backward_s, filled
