"""torch's flight recorder: which collectives each rank has begun, and where the ranks differ.

It keeps the newest ones in memory. When a run is given up they are written to the logs of the run;
`torchfrtrace` reads such files of all ranks.
"""

import base64
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from scale_smog.errors import first_few

BACKENDS = ("gloo", "nccl2", "nccl")  # torch calls its newer NCCL nccl2; each has a recorder
NUM_KEPT = 2000  # collectives; a step of a deep net with BatchNorm over all ranks begins some 200
NUM_COMPARED = 600
DIFFERENCE = "where the others began"
FILE_PREFIX = "flight-recorder-"


class Collective(NamedTuple):
    """One that a rank has begun."""

    group: str  # of processes
    number: int  # of the group's collectives, the same on all its ranks
    what: str  # such as "all_reduce [3000, 129]"

    def __str__(self) -> str:
        return f"{self.what} as collective {self.number} of process group {self.group}"


History = list[Collective]


def configure(folder: Path) -> None:
    """Has dumps written into a folder; call it before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NUM_KEPT))
    os.environ.setdefault("TORCH_FR_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / FILE_PREFIX))


def dump(rank: int) -> None:
    """Writes this rank's flight-recorder-BACKEND-RANK, one for each backend that it has used."""
    for backend in BACKENDS:
        with suppress(Exception):  # a dump that fails must not keep a run from ending
            if _entries(backend):
                path = Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}{backend}-{rank}")
                path.write_bytes(_pickled(backend))


def history() -> History:
    """This rank's newest collectives, oldest first of each backend; no sends and receives."""
    found: History = []
    for backend in BACKENDS:
        with suppress(Exception):  # a build of torch without it
            entries = [entry for entry in _entries(backend) if not entry["is_p2p"]]
            found += [_collective(backend, entry) for entry in entries[-NUM_COMPARED:]]
    return found


def _entries(backend: str) -> list[dict]:
    if backend == "nccl":  # its recorder is apart from the others
        return json.loads(_of_nccl("_dump_nccl_trace_json")(True, False)).get("entries", [])
    return json.loads(c10d._dump_fr_trace_json(True, False, backend)).get("entries", [])


def _pickled(backend: str) -> bytes:
    """As `torchfrtrace` reads it."""
    if backend == "nccl":
        return _of_nccl("_dump_nccl_trace")()
    return c10d._dump_fr_trace(backend=backend)


def _of_nccl(name: str) -> Callable[..., bytes]:
    return getattr(c10d, name)  # builds of torch without CUDA have none


def _collective(backend: str, entry: dict) -> Collective:
    name = entry["profiling_name"].rpartition(":")[2]
    sizes = ", ".join(str(size) for size in entry["input_sizes"])
    group = f"{entry['process_group'][0]} of {backend}"  # each backend of a group counts for itself
    return Collective(group, entry["collective_seq_id"], f"{name} {sizes}")


def publish(store: dist.Store, rank: int) -> None:
    """Puts this rank's history into a store, if it answers."""
    packed = zlib.compress(json.dumps(history()).encode())
    with suppress(RuntimeError):
        store.set(_key(rank), base64.b85encode(packed).decode())


def compare_published(store: dist.Store, hosts: Sequence[str]) -> str:
    """Names the ranks whose published history differs from the others'.

    Args:
        store: with the histories.
        hosts: of all ranks.

    Returns:
        Text to append to a sentence; "" where the histories are the same, or too few to tell.
    """
    with suppress(RuntimeError):
        keys = {rank: _key(rank) for rank in range(len(hosts))}
        there = [rank for rank, key in keys.items() if store.check([key])]
        values = store.multi_get([keys[rank] for rank in there])
        histories = {rank: _unpack(value) for rank, value in zip(there, values, strict=True)}
        if difference := first_difference(histories, is_complete=len(there) == len(hosts)):
            ranks, what = difference
            names = first_few([f"rank {rank} on {hosts[rank]}" for rank in ranks])
            return f"; {names} {what}"
    return ""


def _unpack(packed: bytes) -> History:
    fields = json.loads(zlib.decompress(base64.b85decode(packed)))
    return [Collective(*values) for values in fields]


def _key(rank: int) -> str:
    return f"collectives-of-rank-{rank}"


def first_difference(
    histories: Mapping[int, History], is_complete: bool = True
) -> tuple[list[int], str] | None:
    """The ranks that began another collective than most of their group, or have yet to begin it.

    Args:
        histories: by rank; of some ranks or all.
        is_complete: whether of all; else only fewer than half of them are told from the rest.

    Returns:
        The ranks and what they did; None where they have done the same.
    """
    groups = dict.fromkeys(c.group for collectives in histories.values() for c in collectives)
    for group in groups:  # the default one, of all ranks, comes first
        begun = {
            rank: {c.number: c for c in collectives if c.group == group}
            for rank, collectives in histories.items()
        }
        begun = {rank: numbers for rank, numbers in begun.items() if numbers}
        found = _difference_in_group(begun)
        if found and (is_complete or 2 * len(found[0]) < len(begun)):
            return found
    return None


def _difference_in_group(
    begun: Mapping[int, Mapping[int, Collective]],
) -> tuple[list[int], str] | None:
    first = max(min(numbers) for numbers in begun.values())  # that all still remember
    last = max(max(numbers) for numbers in begun.values())
    for number in range(first, last + 1):
        there = {rank: numbers[number] for rank, numbers in begun.items() if number in numbers}
        if not there:
            continue
        most, _ = Counter(there.values()).most_common(1)[0]
        if others := [rank for rank, collective in there.items() if collective != most]:
            return others, f"began {there[others[0]].what} {DIFFERENCE} {most}"
        if late := [rank for rank in begun if rank not in there]:
            return late, f"did not begin {most}, where the others are"
    return None
