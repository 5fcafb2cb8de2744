"""What a recipe would do, without training: parameters, memory, steps and epochs as text."""

import os
from pathlib import Path

from scale_smog import distributed
from scale_smog.config import DataConfig, Recipe
from scale_smog.data import EpochPlan
from scale_smog.data.manifest import nearest_folder
from scale_smog.data.remote.space import use_cache
from scale_smog.data.workers import describe_workers, num_usable_cores, workers_of_rank
from scale_smog.profiling.memory import MemoryPlan, plan_memory
from scale_smog.recipe import dump_recipe
from scale_smog.runtime.stores import is_url
from scale_smog.schedules import Schedules
from scale_smog.small_data import fit_to_data

USUAL_RANKS_A_NODE = 8


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe, parameter counts, memory plan, steps and epochs, as text.

    Where there is no dataset yet, the plan is of `data.num_images` images.

    Raises:
        UserError: the dataset, the number of ranks or the file of first weights does not fit.
    """
    if recipe.model.weights:
        from scale_smog.state import build_initial_nets  # slow to import

        build_initial_nets(recipe.model, recipe.nets)
    num_images, source = _count_images(recipe.data)
    recipe, derived = fit_to_data(recipe, num_images)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [
        ("images", f"{num_images}{source}"),
        *_length_rows(recipe, num_images, world_size),
        *_memory_rows(plan_memory(recipe, world_size, _ranks_per_node(world_size))),
    ]
    lines = [*derived, *([""] if derived else []), *(f"{name:<24}{x}" for name, x in rows)]
    return dump_recipe(recipe) + "\n" + "\n".join(lines)


def _ranks_per_node(world_size: int) -> int:
    """The launcher's, or as many as a node usually has."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return distributed.ranks_per_node()
    return min(world_size, USUAL_RANKS_A_NODE)


def _count_images(data: DataConfig) -> tuple[int, str]:
    """Training images, and a word on where that number is from."""
    if not is_url(data.path) and not Path(data.path).exists():
        near = nearest_folder(Path(data.path))
        return data.num_images, f" (data.num_images; data.path={data.path} is not there{near})"
    from scale_smog.data.datasets import num_images

    use_cache(data.cache_dir, data.cache_gib)
    return num_images(data.path, "train"), ""


def _length_rows(recipe: Recipe, num_images: int, world_size: int) -> list[tuple[str, str]]:
    plan = EpochPlan(num_images, recipe.data.global_batch)
    batch = plan.images_per_rank(world_size)
    schedules = Schedules.of_run(recipe.run, recipe.optimizer, recipe.grouping, plan)
    epochs = schedules.num_steps / schedules.steps_per_epoch
    workers = workers_of_rank(recipe.data.workers, distributed.ranks_per_node())
    return [
        ("steps", f"{schedules.num_steps} ({epochs:.2f} epochs)"),
        ("batch", f"{recipe.data.global_batch} = {world_size} rank(s) x {batch}"),
        ("workers", describe_workers(recipe.data, [workers], world_size, [num_usable_cores()])),
        ("peak learning rate", f"{schedules.peak_lr:g} after {schedules.warmup_steps} steps"),
    ]


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, str]]:
    return [
        ("backbone parameters", f"{memory.num_backbone_parameters / 1e6:.2f} M"),
        ("trained parameters", f"{memory.num_online_parameters / 1e6:.2f} M, heads included"),
        ("memory of a rank", f"{memory.total_mib:.0f} MiB, libraries' buffers not counted"),
        ("  weights, gradients", f"{memory.weights_and_gradients_mib:.0f} MiB"),
        ("  momentum net", f"{memory.momentum_net_mib:.0f} MiB"),
        ("  optimizer", f"{memory.optimizer_mib:.0f} MiB"),
        ("  activations", f"{memory.activations_mib:.0f} MiB"),
        ("  groups and bank", f"{memory.groups_and_bank_mib:.0f} MiB"),
    ]
