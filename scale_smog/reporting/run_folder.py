"""A run's folder belongs to one recipe: the same command resumes, another one is refused."""

import json
from pathlib import Path
from typing import Any

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.recipe import dump_recipe, load_recipe
from scale_smog.runtime.files import write_atomically

RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
DATASET_FILE = "dataset.json"
# Of a look before the run, and of a start that was killed or found the disk full.
KNOWN_FILES = (
    *("profile.json", "scaling.png", "trace"),
    *(DATASET_FILE, f".{DATASET_FILE}.tmp", f".{RECIPE_FILE}.tmp"),
)
FREE_SECTIONS = ("engine", "deadlines")
FREE_KEYS = (
    "run.dir",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_checkpoint_every",
    "run.max_skipped",
    "run.mirror",
    "run.stop_below",
    "run.stop_patience",
    "data.loader",
    "data.device",
    "data.workers",
    "data.path",  # the content is compared by its hash
    "data.num_images",
)
TRAINED_SECTIONS = ("data", "augment", "model", "grouping", "method")
LENGTHS = ("run.steps", "run.epochs")


def kept_recipe(run_dir: str) -> Recipe | None:
    """What the run of this folder is trained by; None if there is no run yet."""
    path = Path(run_dir) / RECIPE_FILE
    try:
        return load_recipe(path) if path.exists() else None
    except OSError as error:  # such as a name that is too long
        raise UserError(f"cannot read run.dir={run_dir}: {error.strerror}") from None


def claim(recipe: Recipe, sha256: str) -> list[str]:
    """Makes `run.dir`, or checks that it is this recipe's; rank 0 looks, all ranks answer alike.

    Args:
        recipe: of the run.
        sha256: of the dataset's manifest.

    Returns:
        A line for every allowed change since the folder was made.

    Raises:
        UserError: the folder is of another recipe or another dataset; names the key.
    """
    verdict: tuple[list[str], str] = ([], "")
    if distributed.is_main():
        try:
            verdict = (_claim(recipe, sha256), "")
        except UserError as error:
            verdict = ([], str(error))
    changes, problem = distributed.broadcast_object(verdict)
    if problem:
        raise UserError(problem)
    return changes


def _claim(recipe: Recipe, sha256: str) -> list[str]:
    folder = Path(recipe.run.dir)
    dataset_file = folder / DATASET_FILE
    changes: list[str] = []
    if (folder / RECIPE_FILE).exists():
        if dataset_sha256(folder) != sha256:
            raise UserError(
                f"{folder} was trained on another dataset than data.path={recipe.data.path}: "
                "give another run.dir"
            )
        kept = load_recipe(folder / RECIPE_FILE)
        if not recipe.run.start_sha256:  # a run that goes on does not read what it began with
            run = recipe.run.model_copy(update={"start_sha256": kept.run.start_sha256})
            recipe = recipe.model_copy(update={"run": run})
        changes = _allowed_changes(kept, recipe)
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file: give another run.dir")
    elif folder.exists() and any(path.name not in KNOWN_FILES for path in folder.iterdir()):
        raise UserError(f"{folder} exists and is not a run's folder: give another run.dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"manifest_sha256": sha256}
        write_atomically(dataset_file, json.dumps(facts).encode())
        write_atomically(folder / RECIPE_FILE, dump_recipe(recipe).encode())
    except OSError as error:
        raise UserError(f"cannot write run.dir={folder}: {error.strerror}") from None
    return changes


def _allowed_changes(old: Recipe, new: Recipe) -> list[str]:
    changes = []
    for key, before, after in differences(old.model_dump(), new.model_dump()):
        section = key.split(".")[0]
        grows = key in LENGTHS and before is not None and after is not None and after > before
        if section not in FREE_SECTIONS and key not in FREE_KEYS and not grows:
            raise UserError(
                f"run folder {new.run.dir} holds a run with {key}={before}, not {after}: "
                f"give another run.dir, or {key}={before}"
            )
        changes.append(f"{key}: {before} -> {after}")
    return changes


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of each setting that differs between two recipes."""
    return [
        (f"{section}.{name}", before, new[section][name])
        for section, values in old.items()
        for name, before in values.items()
        if before != new[section][name]
    ]


def trained_otherwise(start: Path, recipe: Recipe) -> list[str]:
    """A line on each setting of what is trained that differs from the run in another folder."""
    changed = differences(load_recipe(start / RECIPE_FILE).model_dump(), recipe.model_dump())
    return [
        f"another {key} than the start: {before} -> {after}"
        for key, before, after in changed
        if key.split(".")[0] in TRAINED_SECTIONS and key not in (*FREE_KEYS, "model.weights")
    ]


def dataset_sha256(folder: Path) -> str:
    """Of the training split that the run of this folder is trained on; "" if it is not known."""
    path = folder / DATASET_FILE
    return json.loads(path.read_text())["manifest_sha256"] if path.exists() else ""


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """The run's results.json: evaluation -> figure -> value; empty before the first."""
    path = folder / RESULTS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def add_results(folder: Path, results: dict[str, dict[str, float]]) -> None:
    """Puts evaluations into the run's results.json, in place of older ones; on rank 0 only."""
    if distributed.is_main():
        text = json.dumps(read_results(folder) | results, indent=1) + "\n"
        write_atomically(folder / RESULTS_FILE, text.encode())
