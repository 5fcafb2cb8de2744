"""Checks a dataset folder against its manifest: every hash, index, sidecar, label and image."""

import tarfile
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from scale_smog.data.images import BadImageError, decode
from scale_smog.data.labels import UNLABELLED
from scale_smog.data.manifest import DatasetManifest, ShardEntry, load_manifest
from scale_smog.data.prepare.index import index_tar
from scale_smog.data.prepare.work_folder import local_copy
from scale_smog.data.tar_dataset import load_sidecar, npy_bytes
from scale_smog.data.tars import TarMember, format_index
from scale_smog.data.workers import num_usable_cores, run_in_processes
from scale_smog.errors import UserError
from scale_smog.runtime.files import printable
from scale_smog.runtime.stores import Folder, Store, open_folder


@dataclass(frozen=True)
class _ShardCheck:
    place: Folder | Store
    entry: ShardEntry
    num_classes: int
    indexed: bool  # a tar that others made, see index.py


def verify_folder(out: str | Path) -> list[str]:
    """Returns what is wrong with the dataset folder `out`, one line per problem; empty if well.

    Raises:
        UserError: the folder has no manifest that can be read.
    """
    place = open_folder(out)
    manifest = load_manifest(place.url)
    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    checks = [
        _ShardCheck(place, entry, len(manifest.classes), "indexed" in split.options)
        for split in manifest.splits.values()
        for entry in split.shards
    ]
    of_shard = dict(run_in_processes(_shard_problems, checks, num_usable_cores()))
    in_order = [problem for index in range(len(checks)) for problem in of_shard[index]]
    return _count_problems(manifest) + _extra_files(place, entries) + in_order


def _count_problems(manifest: DatasetManifest) -> list[str]:
    problems = []
    for name, split in manifest.splits.items():
        num_samples = sum(entry.num_samples for entry in split.shards)
        if split.num_samples != num_samples:
            problems.append(f"split {name}: {split.num_samples} samples, shards {num_samples}")
    return problems


def _extra_files(place: Folder | Store, entries: list[ShardEntry]) -> list[str]:
    known = {name for e in entries for name in (e.name, e.idx_name, e.npy_name)}
    if isinstance(place, Folder):
        names = [path.name for path in place.path.iterdir()]
    else:
        names = [name for name in place.sizes() if "/" not in name]
    found = sorted(x for x in names if Path(x).suffix in (".tar", ".idx", ".npy"))
    extra = []
    for name in found:
        if name not in known:
            with local_copy(place, [name]) as folder:
                if not _is_empty_tar(folder / name):
                    extra.append(f"{printable(name)}: not in the manifest")
    return extra


def _is_empty_tar(path: Path) -> bool:
    """Whether it is a tar without a good image, which index.py leaves out."""
    try:
        return path.suffix == ".tar" and not len(index_tar(path).rows)
    except UserError:
        return False


def _shard_problems(check: _ShardCheck) -> list[str]:
    entry = check.entry
    try:
        with local_copy(check.place, [entry.name, entry.idx_name, entry.npy_name]) as folder:
            return _problems_of_files(check, folder)
    except OSError as error:
        where = error.filename or check.place
        return [f"{entry.name}: cannot read {where}: {error.strerror}"]


def _problems_of_files(check: _ShardCheck, folder: Path) -> list[str]:
    entry = check.entry
    mismatched = entry.mismatched_files(folder)
    problems = [
        f"{name}: not the file the manifest describes"
        if (folder / name).exists()
        # without the file there is nothing more to compare
        else f"{name}: missing"
        for name in mismatched
    ]
    if entry.npy_name in mismatched or not (folder / entry.name).exists():
        return problems
    if check.indexed:
        return problems + _indexed_problems(folder, entry)
    try:
        rows = load_sidecar(Folder(folder), entry)
        with tarfile.open(folder / entry.name, "r:") as tar:
            samples = _samples(tar)
    except (UserError, tarfile.TarError, OSError) as error:
        return [*problems, f"{entry.name}: {error}"]

    idx = folder / entry.idx_name
    if idx.exists() and idx.read_bytes() != format_index(samples):
        problems.append(f"{entry.idx_name}: does not index {entry.name}")
    if len(samples) != len(rows):
        return [*problems, f"{entry.name}: {len(samples)} samples, the sidecar has {len(rows)}"]
    with open(folder / entry.name, "rb") as file:
        content = file.read()
    for row, members in zip(rows, samples, strict=True):
        found = _sample_problems(content, row, members, check.num_classes)
        problems += [f"{entry.name}: {row['key']:012d}: {problem}" for problem in found]
    return problems


def _indexed_problems(folder: Path, entry: ShardEntry) -> list[str]:
    """Of a tar that others made: index and sidecar must be what making them again would give."""
    try:
        tar = index_tar(folder / entry.name)
    except UserError as error:
        return [f"{entry.name}: {error}"]
    problems = []
    idx = folder / entry.idx_name
    if idx.exists() and idx.read_bytes() != tar.idx:
        problems.append(f"{entry.idx_name}: does not index {entry.name}")
    if (folder / entry.npy_name).read_bytes() != npy_bytes(tar.rows):
        problems.append(f"{entry.npy_name}: does not describe {entry.name}")
    return problems


def _samples(tar: tarfile.TarFile) -> list[list[TarMember]]:
    """Members of the tar, those of one key together."""

    def key_of(info: tarfile.TarInfo) -> str:
        return info.name.partition(".")[0]

    return [
        [TarMember(i.name.partition(".")[2], i.offset_data, i.size, i.name) for i in infos]
        for _, infos in groupby(tar, key_of)
    ]


def _sample_problems(
    tar: bytes, row: np.void, members: list[TarMember], num_classes: int
) -> list[str]:
    key = f"{row['key']:012d}"
    names = [member.name for member in members]
    if len(members) != 2 or names[0].split(".")[0] != key or names[1] != f"{key}.cls":
        return [f"the tar has {' '.join(names)} in its place"]
    image, label = (tar[m.offset : m.offset + m.size] for m in members)

    problems = []
    if (members[0].offset, members[0].size) != (row["offset"], row["size"]):
        problems.append("the sidecar has another offset or size")
    if zlib.crc32(image) != row["crc32"]:
        problems.append("its bytes changed (crc32)")
    if label != str(row["label"]).encode():
        problems.append(f".cls says {label!r}, the sidecar {row['label']}")
    if not UNLABELLED <= row["label"] < num_classes:
        problems.append(f"label {row['label']} has no class")
    try:
        if decode(image).size != (row["width"], row["height"]):
            problems.append("the sidecar has another width or height")
    except BadImageError as error:
        problems.append(f"does not decode: {error}")
    return problems
