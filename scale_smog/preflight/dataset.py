"""Whether every host reads the same dataset."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scale_smog.data.datasets import is_tars, open_split
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.data.manifest import DatasetManifest, ShardEntry, load_manifest, split_sha256
from scale_smog.data.remote.copies import check_tars
from scale_smog.errors import UserError
from scale_smog.preflight.table import Row, most_common
from scale_smog.runtime.stores import Store, is_url, shown

NUM_READERS = 8
MAX_NAMED = 5


class DatasetView(NamedTuple):
    """What a host sees of a dataset."""

    sha256: str  # of the manifest, or of a folder's images; "" where there is none
    files: str  # in words
    problems: tuple[str, ...]


def inspect(path: str, thorough: bool) -> DatasetView:
    """Looks at a dataset folder from this host.

    Args:
        path: of the folder.
        thorough: read every byte and compare hashes; else only whether files are there, whole.
    """
    try:
        if not is_tars(path):
            images = open_split(path, "train")
            assert isinstance(images, FolderDataset)
            problems = _unreadable_images(images) if thorough else ()
            return DatasetView(images.sha256, f"{images.num_samples:,} images", problems)
        manifest = load_manifest(path)
        name = split_sha256(manifest, "train")
        if is_url(path):  # every byte of it is compared as it is read
            check_tars(Store(path), manifest)
            return DatasetView(name, f"{_num_shards(manifest):,} shards", ())
    except (UserError, OSError) as error:
        return DatasetView("", "no files", (str(error),))
    return DatasetView(name, *_inspect_tars(Path(path), manifest, thorough))


def _inspect_tars(
    folder: Path, manifest: DatasetManifest, thorough: bool
) -> tuple[str, tuple[str, ...]]:
    """How many files, in words, and what is wrong with them."""
    entries = [entry for split in manifest.splits.values() for entry in split.shards]

    def problems(entry: ShardEntry) -> list[str]:
        try:
            return _changed_files(folder, entry) if thorough else _missing_files(folder, entry)
        except OSError as error:
            return [f"cannot read {error.filename or entry.name}: {error.strerror}"]

    with ThreadPoolExecutor(NUM_READERS) as pool:  # hashing releases the interpreter's lock
        found = [text for texts in pool.map(problems, entries) for text in texts]
    return f"{len(entries):,} shards", tuple(found)


def _num_shards(manifest: DatasetManifest) -> int:
    return sum(len(split.shards) for split in manifest.splits.values())


def _unreadable_images(images: FolderDataset) -> tuple[str, ...]:
    def problem(sample_id: int) -> str:
        try:
            images.read(sample_id)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return tuple(filter(None, pool.map(problem, range(images.num_samples))))


def _missing_files(folder: Path, entry: ShardEntry) -> list[str]:
    names = (entry.name, entry.idx_name, entry.npy_name)
    found = [f"{name} is missing" for name in names if not (folder / name).is_file()]
    if not found and (size := (folder / entry.name).stat().st_size) != entry.bytes:
        found.append(f"{entry.name} has {size} bytes, the manifest says {entry.bytes}")
    return found


def _changed_files(folder: Path, entry: ShardEntry) -> list[str]:
    return [
        f"{name} is {'changed' if (folder / name).is_file() else 'missing'}"
        for name in entry.mismatched_files(folder)
    ]


def compare(hosts: Sequence[str], views: Sequence[DatasetView], path: str, thorough: bool) -> Row:
    """Names every host with another dataset than most, or with files that are not its.

    Args:
        hosts: names.
        views: what each saw.
        path: of the dataset's folder.
        thorough: whether bytes were read.
    """
    path, is_in_store = shown(path), is_url(path)
    most = most_common([each.sha256 for each in views if each.sha256] or [""])
    faults = []
    for host, each in zip(hosts, views, strict=True):
        if each.sha256 and each.sha256 != most:
            source = next(x for x, view in zip(hosts, views, strict=True) if view.sha256 == most)
            faults.append(f"{host} has another dataset in {path}: copy it from {source}")
        faults += [f"{host}: {text} ({path})" for text in each.problems[:MAX_NAMED]]
        if len(each.problems) > MAX_NAMED:
            faults.append(f"{host}: {len(each.problems) - MAX_NAMED} more files ({path})")
    how = (
        "every byte read on every host"
        if thorough and not is_in_store
        else "all there on every host"
    )
    return Row("dataset", f"{path}: {views[0].files}, {how}", faults)
