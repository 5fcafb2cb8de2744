"""Names what a step waits for, in one sentence, with the setting to try."""

from collections.abc import Mapping

from scale_smog import distributed
from scale_smog.config import Recipe

# The share of a step from which on a part is worth a word.
LOADING, SENDING, UPDATING, GROUPING, CLUSTERING = 0.10, 0.10, 0.12, 0.10, 0.02
IDLE = 0.10


def bottleneck(
    recipe: Recipe, parts: Mapping[str, float], on_gpu: bool, memory_share: float
) -> str:
    """One sentence on the part that is worth the most, and what to set.

    Args:
        recipe: that was profiled.
        parts: seconds of a step's parts.
        on_gpu: where it ran.
        memory_share: peak of the device's memory in use, of all it has; 0: not known.
    """
    step = sum(parts.values())
    share = {name: seconds / step for name, seconds in parts.items()}
    updating = share["optimizer"] + share["ema"]
    found = [
        (share["data_wait"] - LOADING, _loading(recipe), share["data_wait"]),
        (share["communication"] - SENDING, _sending(recipe), share["communication"]),
        (updating - UPDATING, _updating(recipe), updating),
        (share["grouping"] - GROUPING, _grouping(recipe), share["grouping"]),
        (share["kmeans"] - CLUSTERING, _clustering(recipe), share["kmeans"]),
        (share["other"] - IDLE, "between the parts: the host is busy with something else",
         share["other"]),
    ]  # fmt: skip
    excess, sentence, part = max(found)
    if excess > 0:
        return f"{part:.0%} of the step goes {sentence}."
    nets = share["online_forward"] + share["momentum_forward"] + share["backward"]
    return f"{nets:.0%} of the step is the nets' own: {_computing(recipe, on_gpu, memory_share)}."


def _loading(recipe: Recipe) -> str:
    data = recipe.data
    if data.loader == "memory":
        return "to waiting for data.loader=memory: try fewer or smaller views"
    if data.loader not in ("dali", "fast"):
        return f"to waiting for data.loader={data.loader}: try data.loader=dali"
    return (
        f"to waiting for data: try data.workers={2 * max(1, data.workers)}, or shards of smaller "
        "images (data_tools/shard.py --resize-shorter 256)"
    )


def _sending(recipe: Recipe) -> str:
    if recipe.model.batch_norm == "global":
        return "to waiting for other ranks: try model.batch_norm=node"
    if recipe.engine.reduce_precision == "fp32":
        return "to waiting for other ranks: try engine.reduce_precision=bf16"
    return (
        "to waiting for other ranks: try more images a GPU (data.global_batch), or engine.kind=ddp"
    )


def _updating(recipe: Recipe) -> str:
    if recipe.engine.kind == "ddp":
        return (
            "to the optimizer and the momentum update: try more images a GPU, or engine.kind=hsdp"
        )
    return "to optimizer and momentum update: try more images a GPU (data.global_batch)"


def _grouping(recipe: Recipe) -> str:
    return f"to {recipe.grouping.num_groups} groups: try more images a GPU, or fewer groups"


def _clustering(recipe: Recipe) -> str:
    return (
        f"to k-means: try grouping.reset_every={2 * recipe.grouping.reset_every}, or fewer of "
        f"grouping.kmeans_iterations={recipe.grouping.kmeans_iterations}"
    )


def _computing(recipe: Recipe, on_gpu: bool, memory_share: float) -> str:
    if not on_gpu:
        if recipe.engine.precision == "bf16" and not distributed.computes_in_bf16("cpu"):
            return "try engine.precision=fp32, this processor has no instructions for bf16"
        return "a GPU is the setting to try; on a CPU, a smaller net or smaller views"
    if recipe.engine.precision != "bf16":
        return "try engine.precision=bf16"
    if not recipe.engine.compile and recipe.engine.kind != "zero3":
        return "try engine.compile=true"
    if 0 < memory_share < 0.6:
        return "try more images a GPU (data.global_batch), there is memory for it"
    return "it runs as fast as this GPU allows; more images a second need more GPUs"
