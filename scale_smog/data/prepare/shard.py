"""Turns a list of images into the shards, indexes and sidecars of one split.

A shard is a pure function of the plan, so any number of workers writes the same bytes, and an
interrupted run continues with the shards that are not finished.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from scale_smog.data.images import fingerprint
from scale_smog.data.labels import say_unlabelled
from scale_smog.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetManifest,
    SplitManifest,
    existing_manifest,
    write_manifest,
)
from scale_smog.data.prepare.quarantine import BadImage, write_quarantine
from scale_smog.data.prepare.shard_plan import ShardPlan, plan_shards
from scale_smog.data.prepare.sources import Source, SourceOptions, open_source
from scale_smog.data.prepare.sources.source import AS_USUAL
from scale_smog.data.prepare.work_folder import (
    require_no_tars,
    says_what_it_cannot_write,
    staging_folder,
    work_folder,
)
from scale_smog.data.prepare.writer import ShardJob, ShardRecord, finish_shard
from scale_smog.data.workers import num_usable_cores, run_in_processes, start_forkserver
from scale_smog.errors import UserError
from scale_smog.runtime.files import locked
from scale_smog.runtime.stores import Folder, Store, is_url, open_folder

_MIB = 2**20


def shard_folder(
    source: str | Path,
    out: str | Path,
    source_options: SourceOptions = AS_USUAL,
    **options: Any,
) -> SplitManifest:
    """Writes what `open_source` finds at `source` as a split of the dataset `out`.

    The options, errors and guarantees are those of `shard_source`.
    """
    if not is_url(out) and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"OUT {out} lies inside SRC {source}: choose a folder beside it")
    if options.get("workers") != 1:
        start_forkserver(finish_shard.__module__)  # imports what workers need while we list
    opened = open_source(source, source_options)
    say_unlabelled(source, [image.label for image in opened.images])
    return shard_source(opened, out, **options)


def shard_source(
    source: Source,
    out: str | Path,
    *,
    split: str = "train",
    seed: int = 0,
    shard_mib: int = 256,
    shard_samples: int = 2000,
    workers: int | None = None,
    resize_shorter: int | None = None,
    reencode: int | None = None,
    full_check: bool = True,
    max_bad: float = 0.05,
) -> SplitManifest:
    """Writes `source` as the split `split` of the dataset folder `out`.

    The same source, seed, limits and preprocessing give the same bytes, whatever the number of
    workers and however often the run was interrupted: the same call continues it. A split that
    is there already is left as it is. Bad images go to `{split}-quarantine.jsonl`.

    Args:
        source: the images.
        out: dataset folder, made if missing, or its URL in a store. Other splits in it stay.
        split: name of the split; letters, digits and underscores.
        seed: of the shuffle.
        shard_mib: largest shard, MiB.
        shard_samples: most samples in a shard.
        workers: number of processes; default: all cores.
        resize_shorter: shrink images to this shorter side, px; default: never.
        reencode: make JPEGs of this quality of all images; default: only where needed.
        full_check: decode every image; else only read its header.
        max_bad: largest share of bad images, 0 to 1.

    Raises:
        UserError: an argument is out of range, `out` holds something else under this split's
            name, its classes are others, or too many images are bad.
    """
    counts = {"shard_mib": shard_mib, "shard_samples": shard_samples, "workers": workers}
    counts |= {"resize_shorter": resize_shorter, "reencode": reencode}
    _check_arguments(split, seed, counts, max_bad)
    place = open_folder(out)
    store, out = (place, staging_folder(place)) if isinstance(place, Store) else (None, place.path)
    work = out / f".sharding-{split}"
    plan = ShardPlan(
        seed=seed,
        options={
            "shard_mib": shard_mib,
            "shard_samples": shard_samples,
            "full_check": int(full_check),
            "resize_shorter": resize_shorter,
            "reencode": reencode,
        },
        source_fingerprint=fingerprint(source.images),
    )
    written = _existing_split(place, split, source.classes, plan)
    if written is None:
        if store and not work.exists():
            require_no_tars(store, split)
        jobs = [replace(x, store=store) for x in plan_shards(source, plan, split, out, work)]
        with work_folder(work, split, plan) as lock, says_what_it_cannot_write(out):
            records = _run(jobs, split, workers or num_usable_cores(), lock)
            bad = [BadImage.of(*each) for each in source.bad]
            bad += [image for record in records for image in record.bad]
            extra = [BadImage.of(*each) for each in source.extra]
            num_images = len(source.images) + len(source.bad)
            write_quarantine(place, split, bad, extra, num_images, max_bad)
            with locked(out / MANIFEST_NAME):
                written = _publish(place, split, source.classes, plan, records)
    shutil.rmtree(work, ignore_errors=True)
    return written


def _check_arguments(split: str, seed: int, counts: dict[str, int | None], max_bad: float) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise UserError(f"split is {split!r}; use letters, digits and underscores, such as train")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")
    if (counts["reencode"] or 0) > 95:
        raise UserError(f"reencode is {counts['reencode']}; a JPEG's quality is 1 to 95")
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is {max_bad}; it is a share, 0 to 1")


def _existing_split(
    out: Folder | Store, split: str, classes: tuple[str, ...], plan: ShardPlan
) -> SplitManifest | None:
    """The split if `out` has it complete and made by the same plan, None if it has none."""
    manifest = existing_manifest(out)
    if manifest is None:
        return None
    _require_classes(out, manifest, classes)
    existing = manifest.splits.get(split)
    if existing is None:
        return None
    if difference := plan.difference(existing):
        raise UserError(
            f"{out} has a split {split!r} made with {difference}; "
            "write to another folder or under another split name"
        )
    print(f"{out} has the split {split!r} already: {_summary(existing)}", file=sys.stderr)
    return existing


def _require_classes(
    out: Folder | Store, manifest: DatasetManifest, classes: tuple[str, ...]
) -> None:
    if manifest.classes != classes:
        raise UserError(
            f"{out} has {_first_difference(manifest.classes, classes)}; "
            "all splits of a dataset have the same classes: write to another folder"
        )


def _first_difference(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    if len(old) != len(new):
        return f"{len(old)} classes, the source {len(new)}"
    index = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return f"class {index} {old[index]!r}, the source {new[index]!r}"


def _run(jobs: Sequence[ShardJob], split: str, workers: int, lock: IO[str]) -> list[ShardRecord]:
    """Finishes all shards; their records in the order of the jobs."""
    records = {}
    advice = " with fewer workers, it continues"
    num_images = sum(len(job.images) for job in jobs)
    # Shards finish in bursts, so the ETA is from the mean rate; no bar where nobody watches.
    with tqdm(total=num_images, desc=split, unit="img", smoothing=0, disable=None) as bar:
        for index, record in run_in_processes(finish_shard, jobs, workers, lock, advice):
            records[index] = record
            bar.update(len(jobs[index].images))
            for bad in record.bad:
                tqdm.write(f"put aside: {bad.file}: {bad.reason}", file=sys.stderr)
    return [records[index] for index in range(len(jobs))]


def _publish(
    out: Folder | Store,
    split: str,
    classes: tuple[str, ...],
    plan: ShardPlan,
    records: Sequence[ShardRecord],
) -> SplitManifest:
    shards = tuple(record.entry for record in records if record.entry is not None)
    written = SplitManifest(
        seed=plan.seed,
        options=plan.options,
        source_fingerprint=plan.source_fingerprint,
        num_samples=sum(entry.num_samples for entry in shards),
        shards=shards,
    )
    # Read again: another split may have been finished meanwhile.
    existing = existing_manifest(out)
    if existing:
        _require_classes(out, existing, classes)
    splits = dict(sorted({**(existing.splits if existing else {}), split: written}.items()))
    manifest = DatasetManifest(format_version=FORMAT_VERSION, classes=classes, splits=splits)
    write_manifest(out, manifest)
    print(f"{out}: wrote the split {split!r}: {_summary(written)}", file=sys.stderr)
    return written


def _summary(split: SplitManifest) -> str:
    num_mib = sum(entry.bytes for entry in split.shards) / _MIB
    return f"{split.num_samples:,} samples in {len(split.shards):,} shards, {num_mib:,.1f} MiB"
