"""How a checkpoint becomes valid, and how it goes: a staging folder, its manifest, one rename.

A folder gets its name `step-XXXXXXXX` when all of it is on the disk.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from scale_smog.checkpoint.manifest import (
    CheckpointManifest,
    DamagedCheckpoint,
    check_files,
    list_checkpoints,
    read_manifest,
    write_manifest,
)
from scale_smog.errors import UserError
from scale_smog.runtime.files import rename_durably

_LEFT_OVER = re.compile(r"\.step-\d{8}\.(tmp|old)|\.probe-.*")


def staging_folder(final: Path, ending: str) -> Path:
    """A checkpoint's folder while it is made ("tmp") or removed ("old")."""
    return final.with_name(f".{final.name}.{ending}")


def commit(staging: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Gives a finished folder its name; what stands there already is not whole and goes.

    Raises:
        OSError: the disk is full or not writable; the folder then has no name yet.
    """
    written = {path.name for path in staging.iterdir()}
    if written != manifest.files.keys():
        raise OSError(f"{staging} holds {sorted(written)}, not {sorted(manifest.files)}")
    write_manifest(staging, manifest)
    if final.exists():
        remove(final)
    rename_durably(staging, final)


def remove(folder: Path) -> None:
    """Removes a checkpoint; one that is half removed has no checkpoint's name any more."""
    old = staging_folder(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Removes what saves and removals left behind that were interrupted."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_superseded(
    run_dir: Path,
    step: int,
    keep: int,
    keep_every: int,
    is_needed: Callable[[Path], bool] = lambda _: False,
) -> None:
    """Removes older checkpoints than the newest `keep` up to `step`.

    Those of every `keep_every` steps (0: none) stay, those that are needed, and so does what is not
    whole at a glance: `check.py --doctor` tells why it is not.
    """
    candidates = []
    for folder in list_checkpoints(run_dir):
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, slice(0))
        except (DamagedCheckpoint, UserError):
            continue
        if manifest.step <= step:
            candidates.append((folder, manifest.step))
    gone = superseded([its_step for _, its_step in candidates], keep, keep_every)
    for folder, its_step in candidates:
        if its_step in gone and not is_needed(folder):
            remove(folder)


def superseded(steps: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """Of the steps of checkpoints, oldest first, those that need not stay."""
    return [step for step in steps[:-keep] if not keep_every or step % keep_every]
