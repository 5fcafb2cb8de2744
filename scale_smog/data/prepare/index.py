"""Indexes, sidecars and a manifest for tars that others made; the tars stay as they are."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scale_smog.data.images import BadImageError, decode, why_not_as_stored
from scale_smog.data.labels import numbered_classes, say_unlabelled
from scale_smog.data.manifest import (
    FORMAT_VERSION,
    DatasetManifest,
    ShardEntry,
    SplitManifest,
    existing_manifest,
    write_manifest,
)
from scale_smog.data.prepare.quarantine import BadImage, write_quarantine
from scale_smog.data.prepare.tar_names import tars_of_split
from scale_smog.data.prepare.work_folder import local_copy, says_what_it_cannot_write
from scale_smog.data.tar_dataset import SIDECAR_DTYPE, npy_bytes
from scale_smog.data.tars import TarSample, format_index, list_tar
from scale_smog.data.workers import num_usable_cores, run_in_processes
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, printable
from scale_smog.runtime.stores import Folder, Store, open_folder


@dataclass(frozen=True)
class IndexedTar:
    """What a tar holds that can be trained on."""

    idx: bytes  # DALI's index
    rows: np.ndarray  # SIDECAR_DTYPE [num_samples]; `key` counts the images of the tar
    bad: tuple[BadImage, ...]
    extra: tuple[BadImage, ...]  # members that are no images


def index_tar(path: Path) -> IndexedTar:
    """Decodes every image of a tar; what cannot be used is listed in `bad`.

    Raises:
        UserError: the file cannot be read, or is no uncompressed tar.
    """
    listing = list_tar(path)
    bad = [BadImage.of(f"{path.name}#{name}", reason) for name, reason in listing.bad]
    extra = [BadImage.of(f"{path.name}#{name}", reason) for name, reason in listing.extra]
    members, rows = [], []
    with open(path, "rb") as file:
        for key, sample in enumerate(listing.samples):
            file.seek(sample.image.offset)
            content = file.read(sample.image.size)
            try:
                rows.append(_row(key, sample, content))
            except BadImageError as error:
                bad.append(BadImage.of(f"{path.name}#{sample.image.name}", str(error)))
                continue
            members.append(sample.members)
    rows = np.array(rows, SIDECAR_DTYPE)
    return IndexedTar(format_index(members), rows, tuple(bad), tuple(extra))


def _row(key: int, sample: TarSample, content: bytes) -> tuple[int, ...]:
    image = decode(content)
    if reason := why_not_as_stored(image, content):
        raise BadImageError(f"{reason}; write the tars anew with data_tools/shard.py")
    place = (sample.image.offset, sample.image.size)
    return (key, *place, *image.size, sample.label, zlib.crc32(content))


def index_folder(out: str | Path, split: str = "train", max_bad: float = 0.05) -> SplitManifest:
    """Makes a dataset of the tars in `out`, a folder or a URL, which become its split `split`.

    `out` may end with a pattern, such as `tars/a-train-*.tar`: the split's tars among those of the
    folder. A tar that belongs to another split of the manifest already is left out. Images are
    read as they lie in the tars: those with an EXIF orientation stay turned.

    Raises:
        UserError: there are no tars, their names mean several splits, one cannot be read, too many
            images are bad, or the folder cannot be written.
    """
    folder, pattern = _folder_and_pattern(str(out))
    place = open_folder(folder)
    manifest = existing_manifest(place)
    others = {name: s for name, s in manifest.splits.items() if name != split} if manifest else {}
    names = _tars_of_no_split(place, others, pattern)
    names = names if pattern else tars_of_split(place, names, split)
    tars = _run([(place, name) for name in names], split)
    bad = [image for tar in tars for image in tar.bad]
    extra = [member for tar in tars for member in tar.extra]
    labels = np.concatenate([tar.labels for tar in tars])
    with says_what_it_cannot_write(place):
        write_quarantine(place, split, bad, extra, len(labels) + len(bad), max_bad)
        say_unlabelled(place.url, labels)
        described = SplitManifest(
            seed=0,
            options={"indexed": 1},
            source_fingerprint="",
            num_samples=len(labels),
            shards=tuple(tar.entry for tar in tars if tar.entry.num_samples),
        )
        classes = manifest.classes if manifest and others else ()
        classes += numbered_classes(1 + int(labels.max()))[len(classes) :]
        splits = dict(sorted({**others, split: described}.items()))
        write_manifest(
            place, DatasetManifest(format_version=FORMAT_VERSION, classes=classes, splits=splits)
        )
    return described


@dataclass(frozen=True)
class _Record:
    """What is kept of a tar until the last one has been read: little, for sets of any size."""

    entry: ShardEntry
    labels: np.ndarray  # int64 [num_samples]
    bad: tuple[BadImage, ...]
    extra: tuple[BadImage, ...]


def _run(jobs: Sequence[tuple[Folder | Store, str]], split: str) -> list[_Record]:
    """Indexes all tars; their records in the order of the jobs."""
    records = {}
    with tqdm(total=len(jobs), desc=split, unit="tar", disable=None) as bar:
        for number, record in run_in_processes(_index_in_place, jobs, num_usable_cores()):
            records[number] = record
            bar.update()
    return [records[number] for number in range(len(jobs))]


def _index_in_place(job: tuple[Folder | Store, str]) -> _Record:
    place, name = job
    with local_copy(place, [name]) as folder:
        path = folder / name
        tar, num_bytes, sha256 = index_tar(path), path.stat().st_size, file_sha256(path)
    npy = npy_bytes(tar.rows)
    entry = ShardEntry(
        name=name,
        num_samples=len(tar.rows),
        bytes=num_bytes,
        sha256=sha256,
        idx_sha256=hashlib.sha256(tar.idx).hexdigest(),
        npy_sha256=hashlib.sha256(npy).hexdigest(),
    )
    if entry.num_samples:
        with says_what_it_cannot_write(place):
            place.write(entry.idx_name, tar.idx)
            place.write(entry.npy_name, npy)
    return _Record(entry, tar.rows["label"].copy(), tar.bad, tar.extra)


def _folder_and_pattern(out: str) -> tuple[str, str]:
    """What names a folder, and a pattern of some of its tars, "" for all."""
    if not out.endswith(".tar") or Path(out).is_dir():
        return out, ""
    folder, _, pattern = out.rpartition("/")
    return folder or ".", pattern


def _tars_of_no_split(
    place: Folder | Store, splits: dict[str, SplitManifest], pattern: str
) -> list[str]:
    taken = {entry.name for described in splits.values() for entry in described.shards}
    if isinstance(place, Folder):
        found = [path.name for path in place.path.glob("*.tar")]
    else:
        found = [name for name in place.sizes("*.tar") if "/" not in name]
    wanted = pattern or "*.tar"
    names = [name for name in sorted(found) if name not in taken and fnmatchcase(name, wanted)]
    if not names:
        raise UserError(f"no tars {place}/{pattern}" if pattern else f"no tars in {place}")
    for name in names:
        if printable(name) != name:  # the manifest, in JSON, cannot name it
            raise UserError(f"{printable(f'{place}/{name}')}: its name is not UTF-8: rename it")
    return names
