"""Predicts a step on many GPUs from its parts on one and the cost of what the ranks exchange.

    T = max(load, compute + exposed communication) x (1 + sigma sqrt(2 ln G))

Compute is the step's parts, measured on one GPU or estimated from the roof of its operations
(`workload.py`). Communication is what the ranks wait for one another (`communication_model.py`).
The last factor is the slowest of G GPUs whose steps spread normally. Everything that is not known
exactly is a range in the hardware file, and so is every prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scale_smog.config import Recipe
from scale_smog.profiling.communication_model import exposed_s
from scale_smog.profiling.hardware import Hardware
from scale_smog.profiling.sharding import shards_of
from scale_smog.profiling.workload import Parts, Workload, estimate_parts

ESTIMATES = (2, 1, 0)  # pessimistic, nominal, optimistic: ascending images/s
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


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
    shards = shards_of(engine, gpus, per_node)
    return {"optimizer": shards.optimizer, "ema": shards.weights}


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
    """`batch` images on every GPU, however many there are; with the recipe's own scope too."""
    all_scopes = dict.fromkeys([*scopes, recipe.model.batch_norm])
    return [
        predict(recipe, machine, n, engine, scope, batch, measured)
        for n in gpus for engine in engines for scope in all_scopes
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
