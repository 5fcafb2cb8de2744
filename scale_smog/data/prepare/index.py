"""Indexes, sidecars and a manifest for tars that others made; the tars stay as they are."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scale_smog.data.images import BadImageError, decode, has_deep_pixels
from scale_smog.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SIDECAR_DTYPE,
    Manifest,
    Member,
    ShardEntry,
    SplitManifest,
    format_index,
    load_manifest,
    npy_bytes,
    write_manifest,
)
from scale_smog.data.prepare.writer import BadImage
from scale_smog.data.tars import TarSample, list_tar
from scale_smog.data.workers import default_workers, run_in_processes
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256, write_atomically

_READ_BY_ALL = frozenset({"JPEG", "PNG", "WEBP"})


@dataclass(frozen=True)
class IndexedTar:
    """What a tar holds that can be trained on."""

    members: list[list[Member]]  # of each sample
    rows: np.ndarray  # SIDECAR_DTYPE [num_samples]; `key` counts the images of the tar
    bad: tuple[BadImage, ...]


def index_tar(path: Path) -> IndexedTar:
    """Decodes every image of a tar; what cannot be used is listed in `bad`.

    Raises:
        UserError: the file cannot be read, or is no uncompressed tar.
    """
    listing = list_tar(path)
    bad = [BadImage(file=f"{path.name}#{name}", reason=r) for name, r in listing.refused]
    members, rows = [], []
    with open(path, "rb") as file:
        for key, sample in enumerate(listing.samples):
            file.seek(sample.image.offset)
            content = file.read(sample.image.size)
            try:
                rows.append(_row(key, sample, content))
            except BadImageError as error:
                bad.append(BadImage(file=f"{path.name}#{sample.image.name}", reason=str(error)))
                continue
            members.append(list(sample.members))
    return IndexedTar(members, np.array(rows, SIDECAR_DTYPE), tuple(bad))


def _row(key: int, sample: TarSample, content: bytes) -> tuple[int, ...]:
    image = decode(content)
    if image.format not in _READ_BY_ALL:
        raise BadImageError(f"a {image.format}; write the tars anew with data_tools/shard.py")
    if image.format == "PNG" and has_deep_pixels(content):
        raise BadImageError("16 bits a channel; write the tars anew with data_tools/shard.py")
    place = (sample.image.offset, sample.image.size)
    return (key, *place, *image.size, sample.label, zlib.crc32(content))


def index_folder(out: str | Path, split: str = "train", max_bad: float = 0.05) -> SplitManifest:
    """Makes a dataset of the tars in the folder `out`, which become its split `split`.

    A tar that belongs to another split of the manifest already is left out. Images are read as
    they lie in the tars: those with an EXIF orientation stay turned.

    Raises:
        UserError: there are no tars, one cannot be read, or too many images are bad.
    """
    out = Path(out)
    others = load_manifest(out).splits if (out / MANIFEST_NAME).exists() else {}
    others = {name: described for name, described in others.items() if name != split}
    taken = {entry.name for described in others.values() for entry in described.shards}
    paths = [path for path in sorted(out.glob("*.tar")) if path.name not in taken]
    if not paths:
        raise UserError(f"no tars in {out}")

    indexed = dict(run_in_processes(index_tar, paths, default_workers()))
    tars = [indexed[number] for number in range(len(paths))]
    bad = [image for tar in tars for image in tar.bad]
    quarantine = "".join(f"{image.model_dump_json()}\n" for image in bad)
    write_atomically(out / f"{split}-quarantine.jsonl", quarantine.encode())
    num_good = sum(len(tar.rows) for tar in tars)
    if len(bad) > max_bad * (num_good + len(bad)) or not num_good:
        raise UserError(
            f"{len(bad):,} of {num_good + len(bad):,} images or members cannot be used, more than "
            f"max_bad = {max_bad:g} allows; see {out / f'{split}-quarantine.jsonl'}"
        )
    pairs = zip(paths, tars, strict=True)
    shards = tuple(_write_index(path, tar) for path, tar in pairs if len(tar.rows))
    described = SplitManifest(
        seed=0,
        options={"indexed": 1},
        source_fingerprint="",
        num_samples=num_good,
        shards=shards,
    )
    num_classes = 1 + max(int(tar.rows["label"].max()) for tar in tars if len(tar.rows))
    names = load_manifest(out).classes if others else ()
    names += tuple(str(label) for label in range(len(names), num_classes))
    splits = dict(sorted({**others, split: described}.items()))
    write_manifest(out, Manifest(format_version=FORMAT_VERSION, classes=names, splits=splits))
    return described


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
