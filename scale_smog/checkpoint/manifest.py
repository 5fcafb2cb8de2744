"""What makes a checkpoint whole: a manifest with the size and SHA-256 of every file of its folder.

A folder gets its name `step-XXXXXXXX` when all of it is on the disk. Nothing here unpickles.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Self

from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, fsync_folder, rename_durably
from scale_smog.runtime.retries import retry_transient_errors

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TENSOR_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d{8})")
_LEFT_OVER = re.compile(r"\.step-\d{8}\.(tmp|old)|\.probe-.*")


class FileFacts(NamedTuple):
    """What a file was when it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Reads all of a file."""
        digest = retry_transient_errors(lambda: file_sha256(path), path)
        return cls(path.stat().st_size, digest)


class TensorFacts(NamedTuple):
    """A tensor that lies flat in the files, in partitions."""

    shape: list[int]
    dtype: str  # as in torch: float32


class Manifest(NamedTuple):
    """What a checkpoint's folder holds."""

    format_version: int
    step: int  # finished steps
    facts: dict[str, Any]  # of the run, plain JSON values
    tensors: dict[str, TensorFacts]
    files: dict[str, FileFacts]


class DamagedCheckpoint(ValueError):
    """One line on why a checkpoint is not whole."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder of checkpoints."""
    return folder / f"step-{step:08d}"


def staging_folder(final: Path, ending: str) -> Path:
    """A checkpoint's folder while it is made ("tmp") or removed ("old")."""
    return final.with_name(f".{final.name}.{ending}")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes and syncs the manifest and the folder's entries."""
    body = manifest._asdict() | {
        "tensors": {name: list(facts) for name, facts in manifest.tensors.items()},
        "files": {name: list(facts) for name, facts in manifest.files.items()},
    }
    with open(folder / MANIFEST_FILE, "w", encoding="utf-8") as file:
        json.dump({"sha256": _digest(body), "manifest": body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not looked at.

    Raises:
        DamagedCheckpoint: there is none, or it has changed since it was written.
        UserError: a later version of the program wrote it.
    """
    try:
        path = folder / MANIFEST_FILE
        sealed = json.loads(retry_transient_errors(lambda: path.read_text(encoding="utf-8"), path))
        body = sealed["manifest"]
        if sealed["sha256"] != _digest(body):
            raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} has changed since it was written")
        if body["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{folder} has format {body['format_version']}, and this scale_smog reads up to "
                f"{FORMAT_VERSION}: take the version that wrote it"
            )
        body["tensors"] = {name: TensorFacts(*x) for name, x in body["tensors"].items()}
        body["files"] = {name: FileFacts(*x) for name, x in body["files"].items()}
        manifest = Manifest(**body)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE}: {_words(error)}") from None
    except json.JSONDecodeError as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} is not text: {error}") from None
    if folder.name != step_folder(folder.parent, manifest.step).name:
        raise DamagedCheckpoint(f"{folder} holds step {manifest.step}")
    return manifest


def check_files(folder: Path, manifest: Manifest, share: slice = slice(None)) -> None:
    """Compares the sizes of all files, and the hashes of a share of them.

    Raises:
        DamagedCheckpoint: names the first file that is not as it was written.
    """
    for path in folder.glob(f"*{TENSOR_SUFFIX}"):
        if path.name not in manifest.files:
            raise DamagedCheckpoint(f"{path} does not belong to this checkpoint")
    for name, facts in manifest.files.items():
        _check_size(folder, name, facts)
    for name, facts in sorted(manifest.files.items())[share]:
        try:
            if FileFacts.of(folder / name) != facts:
                raise DamagedCheckpoint(f"{folder / name} has changed since it was written")
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name}: {_words(error)}") from None


def _check_size(folder: Path, name: str, facts: FileFacts) -> None:
    if name != Path(name).name:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} names a file elsewhere: {name}")
    try:
        size = retry_transient_errors(lambda: (folder / name).stat().st_size, folder / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder / name}: {_words(error)}") from None
    if size != facts.size:
        raise DamagedCheckpoint(f"{folder / name} has {size} bytes, not {facts.size}")


def find_damage(folder: Path) -> str | None:
    """None if every file is as it was written, else one line on the first that is not."""
    try:
        check_files(folder, read_manifest(folder))
    except (DamagedCheckpoint, UserError) as error:
        return str(error)
    return None


def commit(aside: Path, final: Path, manifest: Manifest) -> None:
    """Gives a finished folder its name; what stands there already is not whole and goes.

    Raises:
        OSError: the disk is full or not writable; the folder then has no name yet.
    """
    written = {path.name for path in aside.iterdir()}
    if written != manifest.files.keys():
        raise OSError(f"{aside} holds {sorted(written)}, not {sorted(manifest.files)}")
    write_manifest(aside, manifest)
    if final.exists():
        remove(final)
    rename_durably(aside, final)


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


def remove_superseded(run_dir: Path, step: int, keep: int, keep_every: int) -> None:
    """Removes older checkpoints than the newest `keep` up to `step`.

    Those of every `keep_every` steps (0: none) stay, and so does what is not whole at a glance:
    `check.py --doctor` tells why it is not.
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
    for folder, its_step in candidates[:-keep]:
        if not keep_every or its_step % keep_every:
            remove(folder)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
