"""What one rank computes at a step, and how long an estimate says it takes on one GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from scale_smog.config import Recipe
from scale_smog.profiling.flops import Op, StepCost, count_step, roofline_s
from scale_smog.profiling.hardware import MICRO, Hardware

UPDATE_BYTES = 48  # of a weight: norms of w and g 8, g + decay x w 12, g x ratio 8, fused SGD 20
EMA_BYTES = 12  # reads both nets and writes one
GROUP_OPS = 40  # operations that assignment, update, loss and their gradients launch
LAUNCHES_AN_OP = 2  # x1 on an H100: 1,410 kernels and copies for 690 counted operations
COUNTED = (2, 4)  # batches from which the cost of all others follows
Parts = Mapping[str, float]  # seconds of a step's parts
_costs: dict[tuple[str, int], StepCost] = {}


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
        recipe.nets,
        data.large_px,
        data.small_px,
        data.num_small_crops,
        recipe.engine.precision,
    )
    if (repr(key), batch) not in _costs:
        cost = count_step(recipe.model, data, batch, recipe.engine.precision, recipe.nets)
        _costs[repr(key), batch] = cost
    return _costs[repr(key), batch]


def estimate_parts(work: Workload, machine: Hardware, estimate: int) -> dict[str, float]:
    """Seconds of a step's parts on one GPU that has not been measured."""
    at, recipe = machine.at(estimate), work.recipe
    peak, bandwidth = machine.flops_per_s(recipe.engine.precision), machine.bytes_per_s
    launch, fraction = at(machine.op_us) * MICRO, at(machine.roofline_fraction)
    launches = recipe.engine.accumulate * LAUNCHES_AN_OP * launch
    parts = {
        name: max(roofline_s(ops, peak, bandwidth) / fraction, len(ops) * launches)
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
    if recipe.kmeans_every:
        rows = recipe.num_kept_features(work.batch)
        flops = 2.0 * rows * grouping.num_groups * recipe.model.dim * grouping.kmeans_iterations
        # Scores are written and read, and products are full float32.
        passes = 3 * 4.0 * rows * grouping.num_groups * grouping.kmeans_iterations
        seconds = flops / machine.flops_per_s("fp32") + passes / bandwidth
        parts["kmeans"] = seconds / fraction / recipe.kmeans_every
    return parts
