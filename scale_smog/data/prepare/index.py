"""Indexes, sidecars and a manifest for tars that others made; the tars stay as they are."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scale_smog.data.images import BadImageError, decode, has_deep_pixels
from scale_smog.data.labels import numbered_classes, say_unlabelled
from scale_smog.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetManifest,
    ShardEntry,
    SplitManifest,
    load_manifest,
    write_manifest,
)
from scale_smog.data.prepare.quarantine import BadImage, write_quarantine
from scale_smog.data.prepare.work_folder import says_what_it_cannot_write
from scale_smog.data.tar_dataset import SIDECAR_DTYPE, npy_bytes
from scale_smog.data.tars import TarMember, TarSample, format_index, list_tar
from scale_smog.data.workers import num_usable_cores, run_in_processes
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, printable, write_atomically

_READ_BY_ALL = frozenset({"JPEG", "PNG", "WEBP"})


@dataclass(frozen=True)
class IndexedTar:
    """What a tar holds that can be trained on."""

    members: list[list[TarMember]]  # of each sample
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
            members.append(list(sample.members))
    return IndexedTar(members, np.array(rows, SIDECAR_DTYPE), tuple(bad), tuple(extra))


def _row(key: int, sample: TarSample, content: bytes) -> tuple[int, ...]:
    image = decode(content)
    if image.format not in _READ_BY_ALL:
        raise BadImageError(f"a {image.format}; write the tars anew with data_tools/shard.py")
    if has_deep_pixels(image, content):
        raise BadImageError("16 bits a channel; write the tars anew with data_tools/shard.py")
    place = (sample.image.offset, sample.image.size)
    return (key, *place, *image.size, sample.label, zlib.crc32(content))


def index_folder(out: str | Path, split: str = "train", max_bad: float = 0.05) -> SplitManifest:
    """Makes a dataset of the tars in the folder `out`, which become its split `split`.

    A tar that belongs to another split of the manifest already is left out. Images are read as
    they lie in the tars: those with an EXIF orientation stay turned.

    Raises:
        UserError: there are no tars, one cannot be read, too many images are bad, or the folder
            cannot be written.
    """
    out = Path(out)
    manifest = load_manifest(out) if (out / MANIFEST_NAME).exists() else None
    others = {name: s for name, s in manifest.splits.items() if name != split} if manifest else {}
    paths = _tars_of_no_split(out, others)
    indexed = dict(run_in_processes(index_tar, paths, num_usable_cores()))
    tars = [indexed[number] for number in range(len(paths))]
    bad = [image for tar in tars for image in tar.bad]
    extra = [member for tar in tars for member in tar.extra]
    labels = np.concatenate([tar.rows["label"] for tar in tars])
    with says_what_it_cannot_write(out):
        write_quarantine(out, split, bad, extra, len(labels) + len(bad), max_bad)
        say_unlabelled(out, labels)
        pairs = zip(paths, tars, strict=True)
        described = SplitManifest(
            seed=0,
            options={"indexed": 1},
            source_fingerprint="",
            num_samples=len(labels),
            shards=tuple(_write_index(path, tar) for path, tar in pairs if len(tar.rows)),
        )
        names = manifest.classes if manifest and others else ()
        names += numbered_classes(1 + int(labels.max()))[len(names) :]
        splits = dict(sorted({**others, split: described}.items()))
        write_manifest(
            out, DatasetManifest(format_version=FORMAT_VERSION, classes=names, splits=splits)
        )
    return described


def _tars_of_no_split(out: Path, splits: dict[str, SplitManifest]) -> list[Path]:
    taken = {entry.name for described in splits.values() for entry in described.shards}
    paths = [path for path in sorted(out.glob("*.tar")) if path.name not in taken]
    if not paths:
        raise UserError(f"no tars in {out}")
    for path in paths:
        if printable(path.name) != path.name:  # the manifest, in JSON, cannot name it
            raise UserError(f"{printable(str(path))}: its name is not UTF-8: rename it")
    return paths


def _write_index(path: Path, tar: IndexedTar) -> ShardEntry:
    idx, npy = path.with_suffix(".idx"), path.with_suffix(".npy")
    write_atomically(idx, format_index(tar.members))
    write_atomically(npy, npy_bytes(tar.rows))
    return ShardEntry(
        name=path.name,
        num_samples=len(tar.rows),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        idx_sha256=file_sha256(idx),
        npy_sha256=file_sha256(npy),
    )
