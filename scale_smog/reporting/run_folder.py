"""A run's folder belongs to one recipe: the same command resumes, another one is refused."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.errors import UserError, first_few
from scale_smog.recipe import dump_recipe, load_recipe
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import locked, write_atomically
from scale_smog.runtime.stores import shown

LOCK_FILE = ".lock"
# A run that was told to stop has a checkpoint to write; NFS keeps a dead host's lock for 90 s.
LOCK_PATIENCE_S, LOCK_LOOK_S = 150.0, 0.2
# Of a look before the run, and of a start that was killed or found the disk full.
KNOWN_FILES = (
    *("profile.json", "scaling.png", "trace", LOCK_FILE, ".probe-*"),
    *(run_layout.DATASET_FILE, f".{run_layout.DATASET_FILE}.tmp", f".{run_layout.RECIPE_FILE}.tmp"),
)
FREE_SECTIONS = ("engine", "deadlines")
FREE_KEYS = (
    "run.dir",
    "run.log_every",
    "run.checkpoint_every",
    "run.evaluate_every",
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
    "data.cache_dir",
    "data.cache_gib",
    "evaluation.batch",
)
TRAINED_SECTIONS = ("data", "augment", "model", "grouping", "method")
LENGTHS = ("run.steps", "run.epochs")


def kept_recipe(run_dir: str) -> Recipe | None:
    """What the run of this folder is trained by; None if there is no run yet."""
    path = Path(run_dir) / run_layout.RECIPE_FILE
    try:
        return load_recipe(path) if path.exists() else None
    except OSError as error:  # such as a name that is too long
        raise UserError(f"cannot read run.dir={run_dir}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def claimed(recipe: Recipe, sha256: str) -> Iterator[list[str]]:
    """Makes `run.dir`, or checks that it is this recipe's, and keeps other runs out (`with`).

    Rank 0 looks, all ranks answer alike.

    Args:
        recipe: of the run.
        sha256: of the dataset's manifest.

    Yields:
        A line for every allowed change since the folder was made.

    Raises:
        UserError: another run is in the folder, or it is of another recipe or another dataset;
            names the process or the key.
    """
    with ExitStack() as lock:
        yield distributed.call_on_main(lambda: _claim(recipe, sha256, lock))


def _claim(recipe: Recipe, sha256: str, lock: ExitStack) -> list[str]:
    folder = Path(recipe.run.dir)
    _require_free_or_known(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(_only_run_in(folder))
    except OSError as error:
        raise UserError(f"cannot write run.dir={folder}: {error.strerror}") from None
    changes: list[str] = []
    facts = {"run": uuid.uuid4().hex}
    if kept := kept_recipe(recipe.run.dir):
        facts |= _dataset_facts(folder)
        if dataset_sha256(folder) != sha256:
            raise UserError(
                f"{folder} was trained on another dataset than data.path={shown(recipe.data.path)} "
                "(tars of a folder have another order): give another run.dir"
            )
        if not recipe.run.start_sha256:  # a run that goes on does not read what it began with
            recipe = recipe.with_values("run", start_sha256=kept.run.start_sha256)
        changes = _allowed_changes(kept, recipe)
    try:
        dataset = json.dumps(facts | {"manifest_sha256": sha256})
        write_atomically(folder / run_layout.DATASET_FILE, dataset.encode())
        write_atomically(folder / run_layout.RECIPE_FILE, dump_recipe(recipe).encode())
    except OSError as error:
        raise UserError(f"cannot write run.dir={folder}: {error.strerror}") from None
    return changes


def _require_free_or_known(folder: Path) -> None:
    if not folder.exists() or (folder / run_layout.RECIPE_FILE).exists():
        return
    if not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file: give another run.dir")
    if any(not any(fnmatch(x.name, known) for known in KNOWN_FILES) for x in folder.iterdir()):
        raise UserError(f"{folder} exists and is not a run's folder: give another run.dir")


@contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process, however that ends.

    Raises:
        UserError: another process has it, named, and does not end soon.
    """
    with open(folder / LOCK_FILE, "a+") as file:
        began, is_said = time.monotonic(), False
        while not _lock(file):
            file.seek(0)
            holder = f"run.dir={folder} is in use by {file.read() or 'another run'}"
            if time.monotonic() > began + LOCK_PATIENCE_S:
                raise UserError(
                    f"{holder}: wait until it has ended, or give another run.dir; if its host is "
                    f"gone, remove {file.name}"
                )
            if not is_said:
                print(f"{holder}; waiting for its end", file=sys.stderr, flush=True)
                is_said = True
            time.sleep(LOCK_LOOK_S)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield


def _lock(file: TextIO) -> bool:
    """Whether no other process has it; a POSIX lock, which NFS knows and no child inherits."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks at all
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _allowed_changes(old: Recipe, new: Recipe) -> list[str]:
    changes, refused = [], []
    for key, before, after in differences(old.model_dump(), new.model_dump()):
        section = key.split(".")[0]
        grows = key in LENGTHS and before is not None and after is not None and after > before
        if section not in FREE_SECTIONS and key not in FREE_KEYS and not grows:
            refused.append((f"{key}={before}", after))
        else:
            changes.append(f"{key}: {before} -> {after}")
    if refused:
        other = "another run.dir and run.mirror" if new.run.mirror else "another run.dir"
        held = first_few([f"{was}, not {after}" for was, after in refused], "; ")
        raise UserError(
            f"run folder {new.run.dir} holds a run with {held}: "
            f"give {other}, or {first_few([was for was, _ in refused], ' ')}"
        )
    return changes


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of each setting that differs; without secrets in URLs."""
    return [
        (f"{section}.{name}", _without_secrets(before), _without_secrets(new[section][name]))
        for section, values in old.items()
        for name, before in values.items()
        if before != new[section][name]
    ]


def _without_secrets(value: Any) -> Any:
    return shown(value) if isinstance(value, str) else value


def trained_otherwise(start: Path, recipe: Recipe) -> list[str]:
    """A line on each setting of what is trained that differs from the run in another folder."""
    changed = differences(
        load_recipe(start / run_layout.RECIPE_FILE).model_dump(), recipe.model_dump()
    )
    return [
        f"another {key} than the start: {before} -> {after}"
        for key, before, after in changed
        if key.split(".")[0] in TRAINED_SECTIONS and key not in (*FREE_KEYS, "model.weights")
    ]


def dataset_sha256(folder: Path) -> str:
    """Of the training split that the run of this folder is trained on; "" if it is not known."""
    return _dataset_facts(folder).get("manifest_sha256", "")


def _dataset_facts(folder: Path) -> dict[str, str]:
    """What dataset.json says, and a name of the run that no other run has."""
    path = folder / run_layout.DATASET_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """The run's results.json: evaluation -> figure -> value; empty before the first."""
    path = folder / run_layout.RESULTS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def add_results(folder: Path, results: dict[str, dict[str, float]]) -> None:
    """Puts evaluations into the run's results.json, in place of older ones; on rank 0 only.

    Results with a "run" are of a newer checkpoint than what is there, of which nothing stays.
    """
    if distributed.is_main():
        with locked(folder / run_layout.RESULTS_FILE):  # evaluations may end at the same time
            kept = {} if "run" in results else read_results(folder)
            text = json.dumps(kept | results, indent=1) + "\n"
            write_atomically(folder / run_layout.RESULTS_FILE, text.encode())
