"""Copies of a run's checkpoints in an object store, for machines that come and go.

A copy is valid when its manifest is there, which is written last and removed first. What comes back
is compared with it like any checkpoint, and brings the files by which a run's folder is known, so
that another recipe or dataset is refused as it is on the disk. A store that fails costs a line on
stderr: the newest checkpoint is copied as soon as it answers again.
"""

import json
import re
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

from scale_smog import distributed
from scale_smog.checkpoint.commit import superseded
from scale_smog.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpoint,
    check_files,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from scale_smog.config import RunConfig
from scale_smog.errors import UserError
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import rename_durably
from scale_smog.runtime.stores import Store

# By the last a run's folder is known.
OF_THE_FOLDER = (run_layout.DATASET_FILE, run_layout.RECIPE_FILE)
RETRY_S = 30.0  # after a copy that failed, besides the patience of the store's own requests
_MANIFEST = re.compile(rf"step-(\d{{8}})/{re.escape(MANIFEST_FILE)}")


def bring_back(run: RunConfig) -> None:
    """Puts the newest whole copy into a run's folder that has none as new, and says so.

    A collective. A store that does not answer keeps no run with checkpoints of its own from going
    on.

    Raises:
        UserError: the mirror cannot be read or written, is another run's, or has no whole copy.
    """
    run_dir = Path(run.dir).absolute()

    def look() -> None:
        mirror = Mirror(run)
        try:
            if name := mirror.pull(run_dir):
                print(f"{name} came back from {mirror}", file=sys.stderr, flush=True)
            mirror.require_writable()
        except (OSError, NotImplementedError) as error:
            reason = f"run.mirror={mirror}: {getattr(error, 'strerror', None) or error}"
            if not list_checkpoints(run_dir):
                raise UserError(
                    f"{reason}; it may hold this run's checkpoints: try again, or begin anew "
                    "without run.mirror"
                ) from None
            _warn(f"{reason}; going on without it")

    if run.mirror:
        distributed.call_on_main(look)


class Mirror:
    """The copies; one process of a run has it.

    Args:
        run: the recipe's section, with a mirror.
    """

    def __init__(self, run: RunConfig):
        self._store, self._run = Store(run.mirror), run
        self._device: int | None = None  # of the folder, where the store is one
        self._changed = threading.Condition()
        self._next: Path | None = None  # to be copied: the newest one only
        self._current: Path | None = None
        self._refusal: str | None = None
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return str(self._store)

    def push(self, folder: Path) -> None:
        """Begins to copy a committed checkpoint; after the one that is on its way, if one is."""
        with self._changed:
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def is_copying(self, folder: Path) -> bool:
        """Whether the files of a checkpoint are still needed here."""
        with self._changed:
            return folder in (self._current, self._next)

    def wait(self, seconds: float) -> str | None:
        """Waits for the newest copy; None, or in words what is not there."""
        with self._changed:
            if self._changed.wait_for(lambda: not (self._next or self._current), seconds):
                return self._refusal
            last = self._next or self._current
        return f"{last.name if last else 'a checkpoint'} is not in {self} yet"

    def pull(self, run_dir: Path) -> str | None:
        """Brings the newest whole copy into a run's folder, with what the folder is known by.

        Returns:
            Its name; None if there is none that is newer than the folder's own checkpoints.

        Raises:
            OSError: the store cannot be read.
            UserError: it is another run's, or none of its copies is whole.
        """
        self._require_folder()
        own, damages = list_checkpoints(run_dir), []
        steps = _whole_steps(self._names())
        if steps and not self._is_same_run(run_dir) and own:
            return None
        for step in reversed(steps):
            final = step_folder(run_dir / run_layout.CHECKPOINTS_FOLDER, step)
            if own and final.name <= own[-1].name:
                return None
            try:
                self._bring(final)
                return final.name
            except DamagedCheckpoint as error:
                damages.append(str(error))
        if damages and not own:
            raise UserError(f"run.mirror={self} has no whole checkpoint: {damages[0]}")
        return None

    def require_writable(self) -> None:
        """Writes and removes a file.

        Raises:
            OSError: the store does not take it.
        """
        self._require_folder()
        self._store.write(".probe", b"")
        self._store.remove(".probe")

    def _require_folder(self) -> None:
        """Of a folder of this machine: that it is there, and is what it was.

        Raises:
            OSError: else copies would fill the disk below what is to be mounted there.
        """
        if (folder := self._store.folder) is None:
            return
        if not folder.is_dir():
            raise OSError(None, "no such folder: make it, or mount what holds it")
        device = folder.stat().st_dev
        if self._device not in (None, device):
            raise OSError(None, "another disk is there now")
        self._device = device

    def _is_same_run(self, run_dir: Path) -> bool:
        """Whether it is known to hold copies of the folder's run.

        Raises:
            UserError: it is known to hold those of another.
        """
        file = run_dir / run_layout.DATASET_FILE
        here = _run_id(file.read_bytes()) if file.exists() else None
        is_there = self._store.size(run_layout.DATASET_FILE) is not None
        there = _run_id(self._store.read(run_layout.DATASET_FILE)) if is_there else None
        if here and there and here != there:
            raise UserError(
                f"run.mirror={self} holds another run than {run_dir}: give each a place of its own"
            )
        return here is not None and here == there

    def _bring(self, final: Path) -> None:
        staging = final.with_name(f".{final.name}.tmp") / final.name
        shutil.rmtree(staging.parent, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            self._store.download(f"{final.name}/{MANIFEST_FILE}", staging / MANIFEST_FILE)
            manifest = read_manifest(staging)
            for name in manifest.files:
                if name != Path(name).name:
                    raise DamagedCheckpoint(f"{MANIFEST_FILE} names a file elsewhere: {name}")
                self._store.download(f"{final.name}/{name}", staging / name)
            check_files(staging, manifest)
            for name in OF_THE_FOLDER:  # before the checkpoint: with it, it is not asked again
                if self._store.size(name) is not None:
                    self._store.download(name, staging.parent / name)
                    rename_durably(staging.parent / name, final.parent.parent / name)
            rename_durably(staging, final)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{self}/{final.name}: a file is missing: {error}") from None
        finally:
            shutil.rmtree(staging.parent, ignore_errors=True)
            with suppress(OSError):  # nothing is left of a copy that did not come
                final.parent.rmdir()
                final.parent.parent.rmdir()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._next is not None)
                self._current, self._next = self._next, None
                folder = self._current
            assert folder is not None
            try:
                self._copy(folder)
                self._tidy(read_manifest(folder).step)
                self._refusal = None
            except UserError as error:
                self._refusal = str(error)
                _warn(f"no copy of {folder.name}: {error}")
            except Exception as error:  # whatever a store's library raises: training goes on
                reason = (isinstance(error, OSError) and error.strerror) or error
                _warn(f"no copy of {folder.name} in {self} yet: {reason}; training goes on")
                with self._changed:  # the checkpoint stays until then, unless a newer one comes
                    self._changed.wait_for(lambda: self._next is not None, RETRY_S)
                    self._next = self._next or folder

    def _copy(self, folder: Path) -> None:
        self._require_folder()
        manifest = read_manifest(folder)
        if _whole_steps(self._names()):  # else there is nothing to lose
            self._is_same_run(folder.parent.parent)
        if self._holds(folder):
            return
        for file in (folder.parent.parent / name for name in OF_THE_FOLDER):
            if file.exists():
                self._store.upload(file, file.name)
        self._store.remove(f"{folder.name}/{MANIFEST_FILE}")  # of an older one of this step
        for name in manifest.files:
            self._store.upload(folder / name, f"{folder.name}/{name}")
        self._store.upload(folder / MANIFEST_FILE, f"{folder.name}/{MANIFEST_FILE}")

    def _holds(self, folder: Path) -> bool:
        name = f"{folder.name}/{MANIFEST_FILE}"
        own = (folder / MANIFEST_FILE).read_bytes()
        return self._store.size(name) == len(own) and self._store.read(name) == own

    def _tidy(self, step: int) -> None:
        """Keeps the copies that `run.dir` would keep, and nothing of unfinished ones before."""
        keep = self._run.keep_checkpoints, self._run.keep_checkpoint_every
        names = self._names()
        steps = [s for s in _whole_steps(names) if s <= step]
        kept = {step_folder(Path(), s).name for s in set(steps) - set(superseded(steps, *keep))}
        newest = step_folder(Path(), step).name
        gone = [
            n for n in names if (folder := n.partition("/")[0]) <= newest and folder not in kept
        ]
        for name in sorted(gone, key=lambda n: not n.endswith(f"/{MANIFEST_FILE}")):
            with suppress(FileNotFoundError):
                self._store.remove(name)

    def _names(self) -> list[str]:
        return list(self._store.sizes("step-????????/*"))


def _run_id(content: bytes) -> str | None:
    """The name of the run in a dataset.json; None in one that is older or torn."""
    try:
        return json.loads(content).get("run")
    except (ValueError, AttributeError):
        return None


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _whole_steps(names: list[str]) -> list[int]:
    """Steps of the copies with a manifest, oldest first."""
    matches = [_MANIFEST.fullmatch(name) for name in names]
    return sorted(int(match.group(1)) for match in matches if match)
