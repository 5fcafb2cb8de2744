"""Checkpoints that are whole or not there: written aside, hashed, renamed, verified at loading."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from scale_smog import distributed

FORMAT_VERSION = 1
FACTS_FILE = "facts.json"
SEAL_FILE = "seal.json"  # size and SHA-256 of the others, written last
_NAME = re.compile(r"step-(\d{8})")


def save(run_dir: Path, step: int, state: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Writes `run_dir/checkpoints/step-XXXXXXXX`; rank 0 writes, all ranks wait.

    Args:
        run_dir: folder of the run.
        step: finished steps.
        state: full tensors under names that know no engine and no number of ranks, whose first
            word is their part: a file of its own. Only rank 0's is read.
        facts: plain JSON values to keep beside them.

    Returns:
        The folder of the checkpoint.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    if distributed.is_main() and not _is_whole(folder):
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir(parents=True)
        for part in {name.split(".")[0] for name in state}:
            # One file a part: the library copies what it writes, and a whole state may not fit.
            tensors = {k: v for k, v in state.items() if k.split(".")[0] == part}
            tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(tensors, aside / f"{part}.safetensors")  # loading it cannot run code
        _write_json(aside / FACTS_FILE, {"format_version": FORMAT_VERSION, "step": step, **facts})
        _write_json(aside / SEAL_FILE, _seal(aside))
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        os.replace(aside, folder)
        _sync(folder.parent)
    distributed.barrier()
    return folder


def load_newest(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """State and facts of the newest whole checkpoint of a run, or None; rank 0 chooses it."""
    folders = [f for f in generations(run_dir) if _is_whole(f)] if distributed.is_main() else []
    newest = distributed.broadcast_object(str(folders[-1]) if folders else "")
    return load(Path(newest)) if newest else None


def load(folder: Path, part: str = "*") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU; of one part, such as "online", or of all) and facts of a checkpoint."""
    facts = json.loads((folder / FACTS_FILE).read_text())
    tensors: dict[str, Tensor] = {}
    for path in folder.glob(f"{part}.safetensors"):
        tensors |= load_file(path)
    return tensors, facts


def generations(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name))


def remove_old(run_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; on rank 0 only."""
    if distributed.is_main():
        for folder in generations(run_dir)[:-keep]:
            shutil.rmtree(folder)


def whole_or_why(folder: Path) -> str | None:
    """None if every file is as it was written, else one line on the first that is not."""
    try:
        seal = json.loads((folder / SEAL_FILE).read_text())
        for name, (size, sha256) in seal.items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, not {size}"
            if _sha256(path) != sha256:
                return f"{path} has changed since it was written"
    except (OSError, ValueError) as error:
        return f"{folder}: {error}"
    return None if FACTS_FILE in seal else f"{folder / SEAL_FILE} does not name {FACTS_FILE}"


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and whole_or_why(folder) is None


def _seal(folder: Path) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_size, _sha256(path)) for path in folder.iterdir()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
