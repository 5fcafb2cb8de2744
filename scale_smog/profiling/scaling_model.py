"""Predicts a step on many GPUs from its parts on one and the cost of what the ranks exchange.

    T = max(load, compute + exposed communication) x (1 + sigma sqrt(2 ln G))

Compute is the step's parts, measured on one GPU or estimated from the roof of its operations.
Communication is what each engine sends, through hierarchical collectives (reduce-scatter within a
node, all-reduce between nodes of what each of its GPUs then holds, all-gather within the node);
what the backward pass hides of it is found by sending each bucket when its last gradient is ready.
The last factor is the slowest of G GPUs whose steps spread normally. Everything that is not known
exactly is a range in the hardware file, and so is every prediction.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale_smog.config import Recipe
from scale_smog.profiling.flops import Op, StepCost, count_step, roof_s
from scale_smog.profiling.hardware import MICRO, Hardware, Link

ESTIMATES = (2, 1, 0)  # pessimistic, nominal, optimistic: ascending images/s
SPLIT_STATE = ("zero1", "zero2")  # whole weights, but optimizer state over all ranks
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
DDP_FIRST_BUCKET, DDP_BUCKET = 2**20, 25 * 2**20  # bytes, torch's defaults
ZERO_BUCKET_NUMEL = 50_000_000
UPDATE_BYTES = 36  # of a weight: LARS reads w, g twice and m, writes w, m; the momentum update
EMA_BYTES = 12  # reads both nets and writes one
FSDP_UNITS = 7  # parts of a net that are gathered at once: stages, rest, projector, predictor
GROUP_OPS = 40  # operations that assignment, update, loss and their gradients launch
COMPUTE_PARTS = ("online_forward", "momentum_forward", "backward")
COUNTED = (2, 4)  # batches from which the cost of all others follows
Parts = Mapping[str, float]
_costs: dict[tuple[str, int], StepCost] = {}


@dataclass(frozen=True)
class Prediction:
    """Images a second of all GPUs."""

    gpus: int
    engine: str
    batch_norm: str | int
    images_per_s: tuple[float, float, float]  # low, nominal, high
    efficiency: float  # nominal, of as many single GPUs

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rates = [round(x, 1) for x in self.images_per_s]
        return vars(self) | {"images_per_s": rates, "efficiency": round(self.efficiency, 4)}


@dataclass(frozen=True)
class Workload:
    """What one rank does at a step, independent of the machine."""

    recipe: Recipe
    batch: int  # images of a rank
    cost: StepCost

    @classmethod
    def of(cls, recipe: Recipe, batch: int) -> "Workload":
        """Counts a recipe's step of `batch` images a rank."""
        few, more = (_counted(recipe, num) for num in COUNTED)
        return cls(recipe, batch, few.at_batch(batch, more, COUNTED))

    @property
    def num_weights(self) -> int:
        """Of the online net."""
        return sum(ready.numel for ready in self.cost.ready)

    @property
    def num_repeats(self) -> int:
        """Forward passes of the online net during the backward pass.

        With checkpointing the whole net counts as repeated, which the stages are nearly.
        """
        engine = self.recipe.engine
        return engine.num_online_forwards - 1 + engine.activation_checkpointing

    @property
    def repeated_forward(self) -> list[Op]:
        """Their operations."""
        return self.num_repeats * self.cost.online_forward


def _counted(recipe: Recipe, batch: int) -> StepCost:
    """Counted once for each net and kinds of views: it takes a second."""
    data = recipe.data
    key = (
        recipe.model,
        data.large_px,
        data.small_px,
        data.num_small_crops,
        recipe.engine.precision,
    )
    if (repr(key), batch) not in _costs:
        cost = count_step(recipe.model, data, batch, recipe.engine.precision)
        _costs[repr(key), batch] = cost
    return _costs[repr(key), batch]


def estimate_parts(work: Workload, machine: Hardware, estimate: int) -> dict[str, float]:
    """Seconds of a step's parts on one GPU that has not been measured."""
    at, recipe = machine.at(estimate), work.recipe
    peak, bandwidth = machine.flops_per_s(recipe.engine.precision), machine.bytes_per_s
    launch, fraction = at(machine.op_us) * MICRO, at(machine.roofline_fraction)
    launches = recipe.engine.accumulate * launch
    parts = {
        name: max(roof_s(ops, peak, bandwidth) / fraction, len(ops) * launches)
        for name, ops in (
            ("online_forward", work.cost.online_forward),
            ("momentum_forward", work.cost.momentum_forward),
            ("backward", [*work.repeated_forward, *work.cost.backward]),
        )
    }
    grouping = recipe.grouping
    views = 2 + recipe.data.num_small_crops
    scores = 4.0 * grouping.num_groups * (8 * work.batch * views + 12 * recipe.model.dim)
    parts["grouping"] = max(scores / bandwidth / fraction, GROUP_OPS * launch)
    parts["optimizer"] = UPDATE_BYTES * work.num_weights / bandwidth / fraction
    parts["ema"] = EMA_BYTES * work.num_weights / bandwidth / fraction
    parts["kmeans"] = 0.0
    if grouping.kmeans:
        rows = recipe.bank_steps * work.batch
        flops = 2.0 * rows * grouping.num_groups * recipe.model.dim * grouping.kmeans_iterations
        # Scores are written and read, and products are full float32: an eighth of TF32's rate.
        passes = 3 * 4.0 * rows * grouping.num_groups * grouping.kmeans_iterations
        seconds = 8 * flops / machine.flops_per_s("fp32") + passes / bandwidth
        parts["kmeans"] = seconds / fraction / grouping.reset_every
    return parts


def predict_step(
    work: Workload, parts: Parts, gpus: int, engine: str, scope: str | int, machine: Hardware,
    estimate: int,
) -> float:  # fmt: skip
    """Seconds of a step on `gpus` GPUs.

    Args:
        work: what a rank does.
        parts: seconds of each part on one GPU that holds the whole net; `communication` and
            `data_wait` among them are left out, as they are predicted.
        gpus: G.
        engine: `engine.kind`.
        scope: `model.batch_norm`.
        machine: what it runs on.
        estimate: 0 optimistic, 1 nominal, 2 pessimistic.
    """
    at = machine.at(estimate)
    own = {k: v for k, v in parts.items() if k not in ("communication", "data_wait")}
    for name, shards in _shards(engine, gpus, machine.gpus_per_node).items():
        own[name] = own.get(name, 0.0) / shards
    step = sum(own.values())
    step += sum(exposed_s(work, own, gpus, engine, scope, machine, estimate).values())
    step = max(step, work.batch / at(machine.loader_images_per_s))
    return step * (1 + at(machine.straggler) * math.sqrt(2 * math.log(gpus)))


def whole_parts(parts: Parts, engine: str, ranks: int, per_node: int) -> dict[str, float]:
    """Parts measured on one of several ranks, as one GPU with the whole net would have them."""
    shards = _shards(engine, ranks, per_node)
    return {name: seconds * shards.get(name, 1) for name, seconds in parts.items()}


def _shards(engine: str, gpus: int, per_node: int) -> dict[str, int]:
    """Over how many ranks the work of a part is split."""
    weights = _weight_parts(engine, gpus, per_node)
    return {"optimizer": gpus if engine in SPLIT_STATE else weights, "ema": weights}


def exposed_s(
    work: Workload, parts: Parts, gpus: int, engine: str, scope: str | int, machine: Hardware,
    estimate: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds that a step waits for the other ranks, by cause; all 0 on one GPU."""
    if gpus == 1:
        return {"weights": 0.0, "batch_norm": 0.0, "groups": 0.0}
    net = Network(machine, estimate)
    recipe = work.recipe
    group_bytes = 4.0 * recipe.grouping.num_groups * (recipe.model.dim + 1)
    groups = 2 * net.seconds("all_reduce", group_bytes, gpus)
    if recipe.grouping.kmeans:
        rounds = recipe.grouping.kmeans_iterations / recipe.grouping.reset_every
        groups += rounds * net.seconds("all_reduce", 2 * group_bytes, gpus)
    return {
        "weights": _weights_s(work, parts, gpus, engine, net),
        "batch_norm": _batch_norm_s(work, gpus, scope, net),
        "groups": groups,
    }


class Network:
    """Seconds of collectives on a machine, by one estimate."""

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
        latency = transfer = 0.0
        if in_node > 1:
            latency += self._at(machine.node.latency_us) * MICRO
            transfer += self._ring(machine.node, num_bytes, in_node)
        if nodes > 1:
            latency += self._at(machine.network.latency_us) * MICRO * math.log2(nodes)
            transfer += self._ring(machine.network, num_bytes / in_node, nodes)
        return messages * latency + transfer * machine.collective_shares[kind]

    def _ring(self, link: Link, num_bytes: float, ranks: int) -> float:
        """Of an all-reduce's bytes over a link (Patarasuk and Yuan, JPDC 69, 2009)."""
        return 2 * (ranks - 1) / ranks * num_bytes / (self._at(link.gb_per_s) * 1e9)

    def hide(self, sent_s: float, unhidden_s: float) -> float:
        """What is left of communication during a pass that would leave `unhidden_s` at best."""
        return max((1 - self.overlap) * sent_s, unhidden_s)


def _weights_s(work: Workload, parts: Parts, gpus: int, engine: str, net: Network) -> float:
    """What the exchange of gradients and weights adds to a step."""
    per_node = net.machine.gpus_per_node
    grad_bytes = 2 if work.recipe.engine.reduce_precision == "bf16" else 4
    if engine in ("zero2", "zero3"):  # they share the gradients of every micro-batch
        grad_bytes *= work.recipe.engine.accumulate
    gradients, weights = work.num_weights * grad_bytes, work.num_weights * 4.0
    if engine in ("ddp", "zero1", "zero2"):
        kind = "reduce_scatter" if engine == "zero2" else "all_reduce"
        sent = [
            (ready_s, net.seconds(kind, num_bytes, gpus))
            for ready_s, num_bytes in _buckets(work, parts["backward"], grad_bytes, engine)
        ]
        total = sum(seconds for _, seconds in sent)
        if engine == "ddp":
            return net.hide(total, finish_s(sent) - parts["backward"])
        # DeepSpeed waits for its buckets, and for the new weights after the optimizer.
        return total + net.seconds("all_gather", weights, gpus) + _norms_s(work, gpus, net)
    config, num_sizes = work.recipe.engine, 2 if work.recipe.data.num_small_crops else 1
    # For each pass forward and backward, and the momentum net, of each micro-batch.
    num_gathers = config.accumulate * ((config.num_online_forwards + 1) * num_sizes + 1)
    shards = _weight_parts(engine, gpus, per_node)
    messages = len(work.cost.norm_channels) if engine == "zero3" else FSDP_UNITS
    sent_s = num_gathers * net.seconds("all_gather", weights, shards, messages)
    sent_s += net.seconds("reduce_scatter", gradients, shards, messages)
    # A part is copied into the message and the whole out of it; gradients likewise.
    sent_s += 2 * (1 + 1 / shards) * (num_gathers * weights + gradients) / net.machine.bytes_per_s
    if gpus > shards:  # hsdp: the nodes' copies add up their parts, one GPU of each node with one
        copies = Network(net.machine.model_copy(update={"gpus_per_node": 1}), net.estimate)
        sent_s += copies.seconds("all_reduce", gradients / shards, gpus // shards, messages)
    compute = sum(parts[name] for name in COMPUTE_PARTS)
    return net.hide(sent_s, sent_s - compute) + _norms_s(work, shards, net)


def _norms_s(work: Workload, ranks: int, net: Network) -> float:
    return net.seconds("all_reduce", 8.0 * len(work.cost.ready), ranks)


def _batch_norm_s(work: Workload, gpus: int, scope: str | int, net: Network) -> float:
    """One all-gather a batch norm and pass, one all-reduce in the backward pass; none hidden."""
    cost = work.cost
    sizes = {"global": gpus, "node": min(gpus, net.machine.gpus_per_node), "local": 1}
    ranks = min(gpus, sizes.get(str(scope), int(scope) if str(scope).isdigit() else 1))
    both = [*cost.norm_channels, *cost.momentum_norm_channels]
    passed = both + work.num_repeats * cost.norm_channels
    seconds = sum(net.seconds("all_gather", 4.0 * (2 * c + 1) * ranks, ranks) for c in passed)
    seconds += sum(net.seconds("all_reduce", 8.0 * c, ranks) for c in cost.norm_channels)
    seconds *= work.recipe.engine.accumulate
    if ranks < gpus:  # running statistics are averaged at the end of the step
        seconds += net.seconds("all_reduce", 8.0 * sum(both), gpus)
    return seconds


def _weight_parts(engine: str, gpus: int, per_node: int) -> int:
    return {"zero3": gpus, "fsdp": gpus, "hsdp": min(gpus, per_node)}.get(engine, 1)


def _buckets(
    work: Workload, backward_s: float, value_bytes: int, engine: str
) -> Iterable[tuple[float, float]]:
    """When each bucket of gradients is full, seconds into the backward pass, and its bytes."""
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


def finish_s(sent: Sequence[tuple[float, float]]) -> float:
    """When the last of messages (ready, seconds) is through, sent one at a time and in order."""
    free = 0.0
    for ready_s, seconds in sent:
        free = max(free, ready_s) + seconds
    return free


def predict(
    recipe: Recipe, machine: Hardware, gpus: int, engine: str, scope: str | int,
    batch: int, measured: "Measured | None" = None,
) -> Prediction:  # fmt: skip
    """Images a second with `batch` images a GPU."""
    work = Workload.of(recipe, batch)
    rates, alone = [], []
    for estimate in ESTIMATES:
        if measured:
            parts = measured.corrected(estimate_parts(work, machine, 1))
        else:
            parts = estimate_parts(work, machine, estimate)
        step = predict_step(work, parts, gpus, engine, scope, machine, estimate)
        rates.append(gpus * batch / step)
        alone.append(batch / predict_step(work, parts, 1, "ddp", "local", machine, estimate))
    low, nominal, high = rates
    return Prediction(gpus, engine, scope, (low, nominal, high), nominal / (gpus * alone[1]))


@dataclass(frozen=True)
class Measured:
    """A step that was measured on one GPU; it corrects estimates for other batches and GPUs."""

    work: Workload
    parts: Parts
    machine: Hardware  # that it was measured on

    def corrected(self, estimate: Parts) -> dict[str, float]:
        """Another step's estimated parts, each times this step's measured over estimated.

        The host's idle time between the parts, `other`, is no estimate's and is added as measured.
        """
        own = estimate_parts(self.work, self.machine, 1)
        parts = {
            name: seconds * (self.parts.get(name, 0.0) / own[name] if own[name] else 1.0)
            for name, seconds in estimate.items()
        }
        return parts | {"other": self.parts.get("other", 0.0)}


def weak_scaling(
    recipe: Recipe, machine: Hardware, batch: int, measured: Measured | None = None,
    gpus: Sequence[int] = GPU_COUNTS, engines: Sequence[str] = ENGINES,
    scopes: Sequence[str | int] = ("global", "node", "local"),
) -> list[Prediction]:  # fmt: skip
    """`batch` images on every GPU, however many there are."""
    return [
        predict(recipe, machine, n, engine, scope, batch, measured)
        for n in gpus for engine in engines for scope in scopes
    ]  # fmt: skip


def strong_scaling(
    recipe: Recipe, machine: Hardware, measured: Measured | None = None,
    gpus: Sequence[int] = GPU_COUNTS,
) -> list[Prediction]:  # fmt: skip
    """The recipe's global batch on ever more GPUs, by its own engine and scope."""
    total = recipe.data.global_batch
    return [
        predict(
            recipe, machine, n, recipe.engine.kind, recipe.model.batch_norm, total // n, measured
        )
        for n in gpus
        if total % n == 0
    ]
