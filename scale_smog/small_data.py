"""What a recipe leaves open, from the number of images and steps: for small sets.

The defaults in `config.py` are the paper's, made for 1.28 million images and 64 GPUs. With few
images and steps they hardly learn; docs/learning.md has the measurements behind these.
"""

from typing import Any

from scale_smog.config import Recipe, RunConfig
from scale_smog.recipe import validate

IMAGES_A_GROUP, MOST_GROUPS = 25, 3000  # the paper's 3,000 from 75,000 images on
FEATURES_A_GROUP = 2.5  # that k-means reads
SOONEST_RESET, FEWEST_RESETS = 20, 15  # steps; of a run
HEAD_WIDTH = 2048  # the paper's: heads of 512 learnt less
SHORT_RUN, SHORT_EMA, LONG_EMA = 1000, 0.9, 0.99  # steps; a momentum net that keeps up
WARMUP_SHARE = 0.05  # of the run
LOOKS = 10  # checkpoints, and evaluations, of a run


def fit_to_data(
    recipe: Recipe, num_images: int, begun: Recipe | None = None
) -> tuple[Recipe, list[str]]:
    """Fills in what the recipe does not give, where `run.small_data` asks for it.

    Args:
        recipe: as read; what it gives stays.
        num_images: N, of the training split.
        begun: what the run began with, if it has: it keeps its values when it is made longer.

    Returns:
        The recipe that is trained, with the number of images, and a line on each value that was
        derived or cannot be meant.

    Raises:
        UserError: what the recipe gives does not fit what is derived.
    """
    recipe = recipe.with_values("data", num_images=num_images)  # what is planned with
    if not recipe.run.small_data:
        return recipe, _doubts(recipe)
    given = recipe.model_dump(exclude_unset=True)
    tree = {section: dict(values) for section, values in given.items()}
    lines = []
    for key, value, reason in _derived(recipe, num_images):
        section, name = key.split(".")
        if name not in tree.setdefault(section, {}):
            if begun:
                value, reason = getattr(getattr(begun, section), name), "as the run began"
            tree[section][name] = value
            lines.append(f"small data: {key}={value} ({reason})")
    fitted = validate(Recipe, tree)
    return fitted, lines + _doubts(fitted)


def _doubts(recipe: Recipe) -> list[str]:
    """A line where there are fewer images than groups of them."""
    num_groups, num_images = recipe.grouping.num_groups, recipe.data.num_images
    if not recipe.method.has_groups or num_groups <= num_images:
        return []
    words = f"grouping.num_groups={num_groups} for {num_images} images"
    return [f"warning: {words}: a group should have many; run.small_data=true derives how many"]


def _derived(recipe: Recipe, num_images: int) -> list[tuple[str, Any, str]]:
    """Key, value and reason of each."""
    batch, grouping = recipe.data.global_batch, recipe.grouping
    num_steps = recipe.run.steps or int((recipe.run.epochs or 0) * num_images / batch)
    nets, method = recipe.nets, recipe.method
    num_groups = max(2, min(MOST_GROUPS, num_images // IMAGES_A_GROUP))
    if "num_groups" in grouping.model_fields_set:
        num_groups = grouping.num_groups
    bank_steps = -(-int(FEATURES_A_GROUP * num_groups) // batch)
    reset_every = max(SOONEST_RESET, bank_steps)
    reset_every = max(1, min(reset_every, num_steps // FEWEST_RESETS))
    ema = SHORT_EMA if num_steps < SHORT_RUN else LONG_EMA
    every, usual = max(1, num_steps // LOOKS), RunConfig.model_fields["checkpoint_every"].default
    rows: list[tuple[str, Any, str]] = [("run.evaluate_every", every, f"{LOOKS} times a run")]
    if every < usual and not recipe.run.keep_checkpoint_every:
        rows.append(("run.checkpoint_every", every, f"{LOOKS} times a run"))
    if nets.num_momentum_views:
        rows.append(("model.ema", ema, f"{num_steps} steps"))
    rows.append(("model.head_width", HEAD_WIDTH, "the paper's, for small sets too"))
    if method.has_bank:
        rows.append(("model.identity_predictor", True, "p = z at the start"))
    if method.has_groups:
        rows.append(("grouping.num_groups", num_groups, f"{num_images} images"))
    if method.has_bank:
        rows += [
            ("grouping.bank_steps", bank_steps, f"{FEATURES_A_GROUP} features a group"),
            ("grouping.reset_every", reset_every, f"at least {FEWEST_RESETS} resets"),
        ]
    if "name" not in recipe.optimizer.model_fields_set:
        epochs = round(WARMUP_SHARE * num_steps * batch / num_images, 3)
        rows += [
            ("optimizer.name", "adamw", "few steps"),
            ("optimizer.weight_decay", 0.01, "adamw's"),
            ("optimizer.warmup_epochs", epochs, f"{WARMUP_SHARE:.0%} of the run"),
        ]
        if "base_lr" not in recipe.optimizer.model_fields_set:
            rows += [
                ("optimizer.base_lr", 2e-3, "adamw's"),
                ("optimizer.lr_batch", batch, "the rate does not grow with the batch"),
            ]
    return rows
