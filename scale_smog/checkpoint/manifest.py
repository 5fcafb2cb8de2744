"""What a checkpoint's folder must hold: the size and SHA-256 of every file; nothing unpickles."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Self

from scale_smog.errors import UserError
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import file_sha256, fsync_folder
from scale_smog.runtime.retries import retry_transient_errors

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TENSOR_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d{8})")


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


class CheckpointManifest(NamedTuple):
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


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    folders = (run_dir / run_layout.CHECKPOINTS_FOLDER).glob("step-*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name))


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
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


def read_manifest(folder: Path) -> CheckpointManifest:
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
        manifest = CheckpointManifest(**body)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE}: {_words(error)}") from None
    except json.JSONDecodeError as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST_FILE} is not text: {error}") from None
    if folder.name != step_folder(folder.parent, manifest.step).name:
        raise DamagedCheckpoint(f"{folder} holds step {manifest.step}")
    return manifest


def check_files(folder: Path, manifest: CheckpointManifest, share: slice = slice(None)) -> None:
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


def find_damage(folder: Path, reads: bool = True) -> str | None:
    """None if every file is as it was written, else one line on the first that is not.

    Args:
        folder: of a checkpoint.
        reads: all of it and compares its hashes; False: sizes alone.
    """
    try:
        check_files(folder, read_manifest(folder), slice(None) if reads else slice(0))
    except (DamagedCheckpoint, UserError) as error:
        return str(error)
    return None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
