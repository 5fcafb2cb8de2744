"""Says before the first step whether checkpoints can be written at all."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from scale_smog import distributed
from scale_smog.distributed import call_on_all_ranks
from scale_smog.errors import UserError

PROBE_BYTES = 2**20
MIB = 2**20


def probe_space(
    folder: Path, num_bytes: int, num_more: int, group: dist.ProcessGroup | None
) -> str | None:
    """Every rank writes a file and sees those of the others; a collective.

    Args:
        folder: of the checkpoints.
        num_bytes: of one, all ranks' parts together.
        num_more: checkpoints that there will be beside those of now.
        group: all ranks.

    Returns:
        A warning if fewer fit.

    Raises:
        UserError: a rank cannot write, does not see what another wrote, or not one fits.
    """
    token = distributed.broadcast_object(f"{socket.gethostname()}-{os.getpid()}")
    probes = [folder / f".probe-{token}-{r}" for r in range(distributed.world_size())]
    mine = probes[distributed.rank()]
    try:
        call_on_all_ranks(lambda: _write(mine), group)
        call_on_all_ranks(lambda: _see(probes), group)
    except OSError as error:
        raise UserError(f"cannot keep checkpoints in {folder}: {error}") from None
    finally:
        with suppress(OSError):
            mine.unlink()
    free = distributed.broadcast_object(shutil.disk_usage(folder).free)
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / MIB:.0f} MiB free and one checkpoint needs "
            f"{num_bytes / MIB:.0f}: free some, or give another run.dir"
        )
    if free < num_more * num_bytes:
        return (
            f"{folder} has room for {free // num_bytes} checkpoints of {num_bytes / MIB:.0f} MiB, "
            f"and {num_more} are to come: free some, or lower run.keep_checkpoints"
        )
    return None


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _see(paths: list[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise OSError(f"{path} of another rank is not there: all hosts must share the folder")
