"""What a recipe would do, without training: parameters, memory, steps and epochs as text."""

import os

from scale_smog.config import Recipe
from scale_smog.data import TarDataset
from scale_smog.data.loaders.build import build_plan
from scale_smog.profiling.memory import plan_memory
from scale_smog.recipe import dump_recipe
from scale_smog.schedules import Schedules
from scale_smog.small_data import fit_to_data
from scale_smog.state import build_initial_nets


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe, parameter counts, memory plan, steps and epochs, as text.

    Raises:
        UserError: the dataset, the number of ranks or the file of first weights does not fit.
    """
    if recipe.model.weights:
        build_initial_nets(recipe.model)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dataset = TarDataset(recipe.data.path, "train")
    recipe, _ = fit_to_data(recipe, dataset.num_samples)
    plan = build_plan(recipe.data, dataset, recipe.run.seed)
    schedules = Schedules.of_run(recipe.run, recipe.optimizer, recipe.grouping, plan)
    batch = len(plan.ids(0, 0, world_size))
    memory = plan_memory(recipe, world_size)
    epochs = schedules.num_steps / schedules.steps_per_epoch
    rows = [
        ("backbone parameters", f"{memory.num_backbone_parameters / 1e6:.2f} M"),
        ("trained parameters", f"{memory.num_online_parameters / 1e6:.2f} M, heads included"),
        ("images", f"{dataset.num_samples}"),
        ("steps", f"{schedules.num_steps} ({epochs:.2f} epochs)"),
        ("batch", f"{recipe.data.global_batch} = {world_size} rank(s) x {batch}"),
        ("peak learning rate", f"{schedules.peak_lr:g} after {schedules.warmup_steps} steps"),
        ("memory of a rank", f"{memory.total_mib:.0f} MiB, libraries' buffers not counted"),
        ("  weights, gradients", f"{memory.weights_and_gradients_mib:.0f} MiB"),
        ("  momentum net", f"{memory.momentum_net_mib:.0f} MiB"),
        ("  optimizer", f"{memory.optimizer_mib:.0f} MiB"),
        ("  activations", f"{memory.activations_mib:.0f} MiB"),
        ("  groups and bank", f"{memory.groups_and_bank_mib:.0f} MiB"),
    ]
    return dump_recipe(recipe) + "\n" + "\n".join(f"{name:<24}{value}" for name, value in rows)
