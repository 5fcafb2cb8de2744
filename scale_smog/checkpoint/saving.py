"""The checkpoints of a run: saved in the background, the newest whole one taken.

torch.distributed.checkpoint plans who writes and reads which range and keeps the bytes in
safetensors files, which cannot run code. Around it: a staging folder, hashes, and one rename.
"""

import math
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from scale_smog import distributed
from scale_smog.checkpoint.commit import (
    commit,
    remove_leftovers,
    remove_superseded,
    staging_folder,
)
from scale_smog.checkpoint.disk_space import probe_space
from scale_smog.checkpoint.loading import read
from scale_smog.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    DamagedCheckpoint,
    FileFacts,
    TensorFacts,
    check_files,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from scale_smog.checkpoint.mirror import Mirror
from scale_smog.checkpoint.planner import SavePlanner, Writer, own_files
from scale_smog.config import RunConfig
from scale_smog.distributed import Partition, call_on_all_ranks
from scale_smog.errors import UserError
from scale_smog.runtime import run_layout

# Ranks that write what several hold. All read it when they resume: from few files, or ranks times
# ranks of them would be opened.
MAX_WRITERS = 8
T = TypeVar("T")


class Restored(NamedTuple):
    """What came back from a checkpoint."""

    step: int  # finished steps
    facts: dict[str, Any]
    values: dict[str, Tensor]  # for each partition, in its shape, on the CPU
    passed_over: list[str]  # why newer checkpoints were not taken


class Checkpoints:
    """The checkpoints of a run; every method is a collective.

    A save copies the partitions and goes on in the background: on a thread, and a process group,
    of its own, because the training talks at the same time.

    Args:
        run: the recipe's section.
        facts: of the run, plain JSON values, kept in every checkpoint.
    """

    def __init__(self, run: RunConfig, facts: dict[str, Any]):
        self._run_dir = distributed.broadcast_object(Path(run.dir).absolute())  # rank 0 decides
        self._folder = self._run_dir / run_layout.CHECKPOINTS_FOLDER
        self._run, self._facts = run, facts
        self._mirror = Mirror(run) if run.mirror and distributed.is_main() else None
        self.newest_step: int | None = None  # that was loaded, or whose save has begun
        self._group = distributed.background_group()
        # Names of ranges that another rank writes, once ranks have shared them.
        self._left_to_others: set[str] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        # A thread begins on GPU 0, whichever is its rank's.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def prepare(self, partitions: dict[str, Partition]) -> str | None:
        """Before the first step: can checkpoints be written here, and how many fit?

        Returns:
            A warning if fewer fit than are to be kept.

        Raises:
            UserError: a rank cannot write, does not see what another wrote, or not one fits.
        """
        if distributed.is_main():
            with suppress(OSError):  # a folder that cannot be written is told below
                remove_leftovers(self._folder)
        num_bytes = self._share_ranges(partitions)
        num_more = self._run.keep_checkpoints + 1 - len(list_checkpoints(self._run_dir))
        return probe_space(self._folder, num_bytes, num_more, self._group)

    def save(self, step: int, partitions: dict[str, Partition]) -> str | None:
        """Starts a checkpoint of `step`; the partitions may change as soon as this returns.

        Returns:
            Why the checkpoint before this one failed, or None.
        """
        problem = self.wait()
        if self._left_to_others is None:
            self._share_ranges(partitions)
        self.newest_step = step
        copies = self._copies(self._own(partitions))
        self._thread = threading.Thread(target=self._write, args=(step, copies), daemon=True)
        self._thread.start()
        return problem

    def wait(self) -> str | None:
        """Waits until the last checkpoint is on the disk; None, or in a line why it is not.

        Every rank hears the same. What is no fault of the disk is raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is None:
            return None
        if not isinstance(problem, OSError):
            raise problem
        whole = []
        with suppress(OSError):  # of a rank whose mount has failed
            whole = list_checkpoints(self._run_dir)
        newest = f"; {whole[-1].name} is there" if whole else ""
        return f"no checkpoint written: {problem}; free some space or mend the disk{newest}"

    def load_newest(self, partitions: dict[str, Partition]) -> Restored | None:
        """Values for the partitions from the newest checkpoint that is whole on all ranks.

        Returns:
            None if the run has none yet.

        Raises:
            UserError: there are checkpoints, and none is whole; nothing is begun anew by itself.
        """
        passed_over: list[str] = []
        for folder in reversed(distributed.call_on_main(lambda: list_checkpoints(self._run_dir))):
            try:
                manifest = self._agreed_manifest(folder)
            except OSError as error:
                passed_over.append(str(error))
                continue
            values = read(folder, partitions, self._group)
            self.newest_step = manifest.step
            if self._mirror:  # the run may have ended before its copy was there
                self._mirror.push(folder)
            return Restored(manifest.step, manifest.facts, values, passed_over)
        if passed_over:
            raise UserError(
                f"none of the {len(passed_over)} checkpoints in {self._folder} is whole: "
                f"{passed_over[0]}; see launcher/check.py --doctor {self._run_dir}, and remove the "
                "folder to begin anew"
            )
        return None

    def wait_for_mirror(self, seconds: float) -> str | None:
        """Waits for the copy of the last checkpoint; None, or in words what is missing."""
        return self._mirror.wait(seconds) if self._mirror else None

    def _agreed_manifest(self, folder: Path) -> CheckpointManifest:
        """The manifest, once all ranks have read the same one and each has hashed its files.

        Raises:
            OSError: on all ranks, if one of them finds the checkpoint damaged.
        """
        found: list[CheckpointManifest] = []

        def check() -> int:
            share = slice(distributed.rank(), None, distributed.world_size())
            try:
                found.append(read_manifest(folder))
                check_files(folder, found[0], share)
            except DamagedCheckpoint as error:
                raise OSError(str(error)) from None
            return crc32(repr(found[0]).encode())

        if len(set(self._on_all(check))) > 1:
            raise OSError(f"{folder} is not the same on all ranks: run.dir must be shared")
        return found[0]

    def _share_ranges(self, partitions: dict[str, Partition]) -> int:
        """hsdp's nodes hold the same ranges: they share the writing, and none is planned twice.

        Returns:
            Bytes of one checkpoint.
        """
        self._left_to_others = set()
        own = self._own(partitions)
        ranges = [(_key(f"{name} from {x.start}"), x.num_bytes) for name, x in own.items()]
        parts = self._on_all(lambda: np.array(ranges, dtype=np.int64).reshape(-1, 2).T)
        keys, num_bytes = np.concatenate(parts, axis=1)  # [ranges of all ranks] each
        _, first, place = np.unique(keys, return_index=True, return_inverse=True)
        start = sum(part.shape[1] for part in parts[: distributed.rank()])
        mine = slice(start, start + len(own))
        num_holders = np.bincount(place)[place[mine]]
        num_before = np.bincount(place[:start], minlength=len(first))[place[mine]]
        writes = keys[mine] % np.minimum(num_holders, MAX_WRITERS) == num_before
        self._left_to_others = {
            name for name, is_own in zip(own, writes, strict=True) if not is_own
        }
        return int(num_bytes[first].sum())

    def _own(self, partitions: dict[str, Partition]) -> dict[str, Partition]:
        """What this rank writes: its ranges, and its part of the tensors that all ranks hold."""
        own = {
            name: partition
            for name, partition in partitions.items()
            if not partition.is_replicated and name not in (self._left_to_others or ())
        }
        world_size = distributed.world_size()
        loads = dict.fromkeys(range(0, world_size, -(-world_size // MAX_WRITERS)), 0)
        shared = [
            (partition.num_bytes, name)
            for name, partition in partitions.items()
            if partition.is_replicated
        ]
        for num_bytes, name in sorted(shared, reverse=True):  # the same on every rank
            writer_rank = min(loads, key=loads.__getitem__)
            loads[writer_rank] += num_bytes
            if writer_rank == distributed.rank():
                own[name] = partitions[name]
        return {name: partition for name, partition in own.items() if partition.values.numel()}

    def _copies(self, partitions: dict[str, Partition]) -> dict[str, Partition]:
        """The partitions with flat copies of their values on the CPU, in memory that is reused."""
        copies = {}
        for name, partition in partitions.items():
            values = partition.values.detach()
            if name not in self._buffers:
                size, dtype = values.numel(), values.dtype
                self._buffers[name] = torch.empty(size, dtype=dtype, pin_memory=values.is_cuda)
            self._buffers[name].view(values.shape).copy_(values, non_blocking=True)
            copies[name] = partition._replace(values=self._buffers[name])
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, step: int, partitions: dict[str, Partition]) -> None:
        """Runs in the background; leaves what went wrong, the same on all ranks."""
        final = step_folder(self._folder, step)
        staging = staging_folder(final, "tmp")
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        try:
            self._on_main(lambda: _make_empty(staging))
            parts = self._on_all(lambda: _write_own(staging, partitions))
            if problems := [part.problem for part in parts if part.problem]:
                raise RuntimeError(problems[0])
            files = {name: facts for part in parts for name, facts in part.files.items()}
            tensors = {name: facts for part in parts for name, facts in part.tensors.items()}
            _check_whole(np.concatenate([part.ranges for part in parts]), tensors)
            manifest = CheckpointManifest(FORMAT_VERSION, step, self._facts, tensors, files)
            self._on_main(lambda: commit(staging, final, manifest))
            self._on_main(lambda: self._mirror.push(final) if self._mirror else None)
            self._on_main(lambda: self._tidy(step))
        except Exception as error:
            self._problem = error
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)

    def _tidy(self, step: int) -> None:
        keep = self._run.keep_checkpoints, self._run.keep_checkpoint_every
        # What is being read cannot go, on NFS; the next save tries again.
        with suppress(OSError):
            remove_leftovers(self._folder)
        with suppress(OSError):
            is_needed = self._mirror.is_copying if self._mirror else lambda _: False
            remove_superseded(self._run_dir, step, *keep, is_needed)

    def _on_all(self, function: Callable[[], T]) -> list[T]:
        return call_on_all_ranks(function, self._group)

    def _on_main(self, function: Callable[[], None]) -> None:
        self._on_all(function if distributed.is_main() else lambda: None)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


class Written(NamedTuple):
    """What a rank has written of a checkpoint."""

    files: dict[str, FileFacts]
    tensors: dict[str, TensorFacts]  # whose first element is this rank's: of all ranks, one says it
    ranges: np.ndarray  # [R, 3] int64: key of the tensor's name, first element, end
    problem: str = ""  # that is no fault of the disk


def _write_own(folder: Path, partitions: dict[str, Partition]) -> Written:
    """Writes this rank's partitions into its own file.

    It plans alone: of 700 tensors in ranges, rank 0 would take 70 ms of its processor for each rank
    to hear of the plan and answer, and every rank would hear of all ranges.
    """
    try:
        dcp.save(
            {name: partition.values for name, partition in partitions.items()},
            storage_writer=Writer(folder),
            planner=SavePlanner(partitions),
            no_dist=True,
        )
    except CheckpointException as error:  # which is no Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        return Written({}, {}, np.empty((0, 3), np.int64), f"rank {distributed.rank()}: {cause!r}")
    return Written(
        {path.name: FileFacts.of(path) for path in own_files(folder, distributed.rank())},
        {name: _tensor_facts(x) for name, x in partitions.items() if x.start == 0},
        np.array([_range(name, x) for name, x in partitions.items()], np.int64).reshape(-1, 3),
    )


def _tensor_facts(partition: Partition) -> TensorFacts:
    return TensorFacts(list(partition.shape), str(partition.values.dtype).removeprefix("torch."))


def _range(name: str, partition: Partition) -> tuple[int, int, int]:
    return _key(name), partition.start, partition.start + partition.values.numel()


def _key(name: str) -> int:
    """A number of 63 bits for the name of a tensor or of a range."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) >> 1


def _check_whole(ranges: np.ndarray, tensors: dict[str, TensorFacts]) -> None:
    """All ranks together must have written every element of every tensor, and none twice.

    Args:
        ranges: [R, 3] of all ranks, as in `Written`.
        tensors: of all ranks.

    Raises:
        RuntimeError: they have not; names a tensor.
    """
    keys, starts, ends = ranges[np.lexsort((ranges[:, 1], ranges[:, 0]))].T
    is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]  # range of its tensor
    is_last = np.roll(is_first, -1)
    is_wrong = starts != np.where(is_first, 0, np.roll(ends, 1))
    names = {_key(name): name for name in tensors}
    sizes = {key: math.prod(tensors[name].shape) for key, name in names.items()}
    is_wrong[is_last] |= ends[is_last] != [sizes.get(key) for key in keys[is_last].tolist()]
    if is_wrong.any():
        name = names.get(int(keys[is_wrong][0]), "a tensor without a beginning")
        raise RuntimeError(f"the ranks' ranges are not the whole of {name}, each element once")
