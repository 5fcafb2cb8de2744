"""The folder of a split that is being written: its plan, its finished shards, and a lock."""

import fcntl
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from scale_smog.data.prepare.shard_plan import ShardPlan
from scale_smog.errors import UserError
from scale_smog.runtime.files import write_atomically
from scale_smog.runtime.stores import Folder, Store

LOCK_PATIENCE_S = 5.0  # workers of a killed run end by themselves


@contextmanager
def work_folder(work: Path, split: str, plan: ShardPlan) -> Iterator[IO[str]]:
    """Makes the folder, or goes on with what an interrupted run has left there.

    A second run that writes the same split is kept out. The lock dies with its process and those
    that it gives the lock to: workers of a killed run may live on for a moment.

    Yields:
        The locked file.

    Raises:
        UserError: another process writes there, the plan is another, or there are tars of others.
    """
    _make_folder(work, split)
    with open(work / "lock", "w") as file:
        _lock(file, work.parent)
        _start_or_continue(work, split, plan)
        yield file


def _lock(file: IO[str], folder: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another process is writing to {folder}") from None
            time.sleep(0.05)
            continue
        except OSError:
            pass  # some network filesystems have no locks
        return


def staging_folder(store: Store) -> Path:
    """Where shards lie on their way to a store, and the list of those that are there."""
    name = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / "scale_smog_shards" / name


def require_no_tars(store: Store, split: str) -> None:
    """Keeps a new split from mixing with tars of others.

    Raises:
        UserError: there are some.
    """
    if foreign := sorted(store.sizes(f"{split}-*.tar")):
        raise UserError(
            f"{store} has {foreign[0]}, which was not begun from this machine's temporary folder: "
            "write to another place or remove it"
        )


@contextmanager
def local_copy(place: Folder | Store, names: Sequence[str]) -> Iterator[Path]:
    """A folder of this machine that has those of the files that there are."""
    if isinstance(place, Folder):
        yield place.path
        return
    with TemporaryDirectory() as folder:
        for name in names:
            with suppress(FileNotFoundError):
                place.download(name, Path(folder) / name)
        yield Path(folder)


@contextmanager
def says_what_it_cannot_write(out: object) -> Iterator[None]:
    """Turns an error of the disk into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None


def _make_folder(work: Path, split: str) -> None:
    out = work.parent
    if not work.exists() and (foreign := sorted(out.glob(f"{split}-*.tar"))):
        raise UserError(
            f"{out} has {foreign[0].name}, which is not from this program: "
            "write to another folder or move it away"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {work}: {error.strerror}") from None


def _start_or_continue(work: Path, split: str, plan: ShardPlan) -> None:
    plan_path = work / "plan.json"
    if not plan_path.exists():
        write_atomically(plan_path, plan.model_dump_json().encode())
        return
    if difference := plan.difference(ShardPlan.model_validate_json(plan_path.read_bytes())):
        raise UserError(
            f"{work.parent} has an unfinished split {split!r} made with {difference}; finish it "
            f"with these, or remove {work} and {split}-* to start again"
        )
