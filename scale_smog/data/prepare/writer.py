"""Writes one shard: its tar, index and sidecar, each whole or not at all."""

import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from scale_smog.config import StrictModel
from scale_smog.data.images import BadImageError, ImageEntry, Preprocessing, preprocess
from scale_smog.data.manifest import ShardEntry
from scale_smog.data.prepare.quarantine import BadImage
from scale_smog.data.tar_dataset import SIDECAR_DTYPE, npy_bytes
from scale_smog.data.tars import TarMember, format_index
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, rename_durably, write_atomically
from scale_smog.runtime.stores import Store


class ShardRecord(StrictModel):
    """What a finished shard leaves in the work folder; `entry` is None if no image was good."""

    entry: ShardEntry | None
    bad: tuple[BadImage, ...]


@dataclass(frozen=True)
class ShardJob:
    """All that decides a shard's bytes, and where it goes."""

    name: str  # such as train-000003
    first_key: int
    images: tuple[ImageEntry, ...]
    read: Callable[[str], bytes]
    preprocessing: Preprocessing
    out: Path
    work: Path
    store: Store | None = None  # where the files go from `out`


def finish_shard(job: ShardJob) -> ShardRecord:
    """Writes a shard, unless an earlier run has finished it and its files are still the same."""
    record_path = job.work / f"{job.name}.json"
    if record_path.exists():
        record = ShardRecord.model_validate_json(record_path.read_bytes())
        if record.entry is None or _is_there(job, record.entry):
            return record
    try:
        record = _write_shard(job)
        if job.store and record.entry:
            _move(job.store, job.out, record.entry)
        write_atomically(record_path, record.model_dump_json().encode())
    except OSError as error:  # sources turn their own into a UserError
        raise UserError(
            f"cannot write {job.store or job.out}/{job.name}.*: {error.strerror}; nothing finished "
            "is lost: make room and run the same command again"
        ) from None
    return record


def _is_there(job: ShardJob, entry: ShardEntry) -> bool:
    if job.store is None:
        return not entry.mismatched_files(job.out)
    names = (entry.idx_name, entry.npy_name)  # they are written after the tar
    return job.store.size(entry.name) == entry.bytes and all(map(job.store.size, names))


def _move(store: Store, folder: Path, entry: ShardEntry) -> None:
    for name in (entry.name, entry.idx_name, entry.npy_name):
        store.upload(folder / name, name)
        (folder / name).unlink()


def _write_shard(job: ShardJob) -> ShardRecord:
    partial = job.work / f"{job.name}.tar"
    with open(partial, "wb") as file:
        samples, rows, bad = _write_tar(file, job)
        file.flush()
        os.fsync(file.fileno())
    if not samples:  # DALI refuses an empty index, so such a shard is left out
        partial.unlink()
        return ShardRecord(entry=None, bad=tuple(bad))

    tar, idx, npy = (job.out / f"{job.name}.{extension}" for extension in ("tar", "idx", "npy"))
    rename_durably(partial, tar)
    write_atomically(idx, format_index(samples))
    write_atomically(npy, npy_bytes(np.array(rows, SIDECAR_DTYPE)))
    entry = ShardEntry(
        name=tar.name,
        num_samples=len(samples),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        idx_sha256=file_sha256(idx),
        npy_sha256=file_sha256(npy),
    )
    return ShardRecord(entry=entry, bad=tuple(bad))


def _write_tar(
    file: IO[bytes], job: ShardJob
) -> tuple[list[list[TarMember]], list[tuple[int, ...]], list[BadImage]]:
    """Writes all good images; returns their members, their sidecar rows, and the bad ones."""
    samples, rows, bad = [], [], []
    for key, source in enumerate(job.images, start=job.first_key):
        try:
            image = preprocess(job.read(source.name), job.preprocessing)
        except BadImageError as error:
            bad.append(BadImage.of(source.name, str(error)))
            continue
        member = _add_member(file, f"{key:012d}", image.extension, image.content)
        label = _add_member(file, f"{key:012d}", "cls", str(source.label).encode())
        crc32 = zlib.crc32(image.content)
        size = (image.width, image.height)
        rows.append((key, member.offset, member.size, *size, source.label, crc32))
        samples.append([member, label])
    # A tar ends with two empty blocks and fills its last record.
    end = file.tell() + 2 * tarfile.BLOCKSIZE
    file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
    return samples, rows, bad


def _add_member(file: IO[bytes], key: str, extension: str, content: bytes) -> TarMember:
    name, size = f"{key}.{extension}", len(content)
    offset = file.tell() + tarfile.BLOCKSIZE
    file.write(tar_header(name, size) + content + bytes(-size % tarfile.BLOCKSIZE))
    return TarMember(extension, offset, size, name)


# USTAR: the default PAX headers make DALI's own index inference and `tar` disagree. Owner, names
# and time are 0 and empty.
_BLANK_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)


def tar_header(name: str, size: int) -> bytes:
    """The header block that `tarfile` writes for a member of this name and size, in bytes.

    Only three fields differ from member to member; filling them in takes a tenth of the time.
    """
    header = bytearray(_BLANK_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)
