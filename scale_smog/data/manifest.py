"""The dataset contract: what a folder of shards holds.

A dataset folder holds, for every split, `{split}-%06d.tar` shards, a DALI index (`.idx`) and a
sidecar (`.npy`) beside each, and `{split}-quarantine.jsonl`. One `manifest.json` describes all
splits. It is written last, so a folder that has one is complete.
"""

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scale_smog.config import StrictModel
from scale_smog.errors import UserError
from scale_smog.runtime.files import file_sha256
from scale_smog.runtime.stores import Folder, Store, is_url

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


class ShardEntry(StrictModel):
    """One shard as the manifest lists it."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    npy_sha256: str

    @property
    def idx_name(self) -> str:
        """File name of the DALI index."""
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def npy_name(self) -> str:
        """File name of the sidecar."""
        return self.name.removesuffix(".tar") + ".npy"

    def mismatched_files(self, folder: Path) -> list[str]:
        """Names of this shard's files that are missing from `folder` or have another hash."""
        expected = {
            self.name: self.sha256,
            self.idx_name: self.idx_sha256,
            self.npy_name: self.npy_sha256,
        }
        return [
            name
            for name, sha256 in expected.items()
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256
        ]


class SplitManifest(StrictModel):
    """One split: how it was made and the shards it consists of, in the order of sample ids."""

    seed: int
    options: dict[str, int | None]
    source_fingerprint: str
    num_samples: int
    shards: tuple[ShardEntry, ...]


class DatasetManifest(StrictModel):
    """All splits of a dataset folder. `classes[label]` is a label's name."""

    format_version: int
    classes: tuple[str, ...]
    splits: dict[str, SplitManifest]

    def split(self, name: str) -> SplitManifest:
        """Returns the split `name`.

        Raises:
            UserError: there is no such split; the message lists those there are.
        """
        if name not in self.splits:
            raise UserError(f"no split {name!r} in the dataset; it has: {', '.join(self.splits)}")
        return self.splits[name]


def write_manifest(place: Folder | Store, manifest: DatasetManifest) -> None:
    """Writes the manifest of a dataset; from then on its splits count as complete."""
    place.write(MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")


def existing_manifest(place: Folder | Store) -> DatasetManifest | None:
    """The manifest, if there is one.

    Raises:
        UserError: it is damaged, or of another format version.
    """
    return None if place.size(MANIFEST_NAME) is None else load_manifest(place.url)


def load_manifest(path: str | Path) -> DatasetManifest:
    """Reads the manifest of the dataset at `path`, a folder or a store's URL.

    Raises:
        UserError: the folder is missing, has no manifest, or one of another format version.
    """
    if is_url(path):
        store = Store(str(path))
        return parse_manifest(_stored_manifest(store), f"{store}/{MANIFEST_NAME}")
    return parse_manifest(_manifest_bytes(Path(path)), str(Path(path) / MANIFEST_NAME))


def parse_manifest(content: bytes, file: str) -> DatasetManifest:
    """The manifest that a file holds.

    Raises:
        UserError: it is damaged, or of another format version.
    """
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields.get("format_version")
    except (ValueError, AttributeError):
        raise UserError(f"{file} is not a manifest: it holds no JSON object") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {version!r}, this version of scale_smog reads "
            f"{FORMAT_VERSION}; write the dataset anew with data_tools/shard.py"
        )
    try:
        return DatasetManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} is damaged at {key}: {first['msg']}") from None


def manifest_sha256(path: str | Path, split: str = "train") -> str:
    """`split_sha256` of one split of the dataset at `path`.

    Raises:
        UserError: the folder is missing, has no manifest or no such split.
    """
    return split_sha256(load_manifest(path), split)


def split_sha256(manifest: DatasetManifest, split: str) -> str:
    """Hex SHA-256 that names the content of one split exactly.

    Other splits may come and go without a change of it.

    Raises:
        UserError: there is no such split.
    """
    described = manifest.model_copy(update={"splits": {split: manifest.split(split)}})
    return hashlib.sha256(described.model_dump_json().encode()).hexdigest()


def nearest_folder(missing: Path) -> str:
    """Suggests what lies where a folder does not, under nearly its name; "" if nothing does."""
    try:
        names = os.listdir(missing.absolute().parent)
    except OSError:
        return ""
    for near in difflib.get_close_matches(missing.name, names):
        if os.path.isdir(missing.with_name(near)):
            return f" (did you mean {missing.with_name(near)}?)"
    return ""


def _stored_manifest(store: Store) -> bytes:
    try:
        return store.read(MANIFEST_NAME)
    except FileNotFoundError:
        raise UserError(
            f"{store} has no {MANIFEST_NAME}: unfinished or foreign; smog shard SRC {store} writes "
            f"a dataset there, smog index {store} takes tars as they are"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {store}/{MANIFEST_NAME}: {error.strerror}") from None


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UserError(
            f"no dataset folder {folder}{nearest_folder(folder)}: data.path=FOLDER names images, "
            "or tars that data_tools/shard.py made"
        )
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        is_foreign = any(folder.glob("*.tar")) and not any(folder.glob(".sharding-*"))
        tool = f"data_tools/index.py {folder}" if is_foreign else "data_tools/shard.py"
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: unfinished or foreign; run {tool}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {folder / MANIFEST_NAME}: {error.strerror}") from None
