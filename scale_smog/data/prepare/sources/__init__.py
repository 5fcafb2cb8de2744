"""What sharding reads: image folders, CSV lists, parquet, tars, archives of known sets."""

from glob import glob
from pathlib import Path

from scale_smog.data.image_folder import holds_images
from scale_smog.data.prepare.sources.cifar10 import cifar10_source
from scale_smog.data.prepare.sources.csv_list import csv_source
from scale_smog.data.prepare.sources.folder import folder_source
from scale_smog.data.prepare.sources.imagenet import imagenet_source
from scale_smog.data.prepare.sources.parquet import parquet_source
from scale_smog.data.prepare.sources.source import AS_USUAL, Source, SourceOptions
from scale_smog.data.prepare.sources.tar import tar_source
from scale_smog.data.prepare.tar_names import tars_of_split
from scale_smog.errors import UserError

__all__ = ["Source", "SourceOptions", "open_source"]

LAYOUTS = {"imagenet": imagenet_source, "cifar10": cifar10_source}  # archives of known sets
_LAYOUT_OF_NAME = {"ILSVRC2012_img_": "imagenet", "cifar-10-binary": "cifar10"}
_KINDS = {".tar": tar_source, ".parquet": parquet_source, ".csv": csv_source}
_ARCHIVES = (".tar.gz", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
_ARCHIVES += (".zip", ".7z", ".rar")
_OTHER_LISTS = (".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".xls")


def open_source(source: str | Path, options: SourceOptions = AS_USUAL) -> Source:
    """Finds out what kind of source it is: tars, parquet or CSV by its ending, else a folder.

    `source` may be a pattern such as `images/train-*.tar` or `train-{000..146}.tar`; a folder
    that holds tars and no images stands for its tars, or for those of `options.split` where all
    are named as ours. ImageNet's and CIFAR-10's archives are known by their names, or by
    `options.layout`.

    Raises:
        UserError: there is nothing of that name, the names of a folder's tars mean several splits,
            or the source itself is at fault.
    """
    folder = Path(source)
    if folder.is_dir():
        tars = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".tar")
        if tars and not holds_images(folder):
            names = tars_of_split(folder, tars, options.split)
            return tar_source([folder / name for name in names], options)
        return folder_source(folder)
    paths = _matching_files(str(source))
    if layout := options.layout or _usual_layout(paths[0].name):
        if len(paths) > 1:
            raise UserError(f"{source} names {len(paths)} files: give one, of layout {layout}")
        return LAYOUTS[layout](paths[0], options)
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{source} names files of several kinds: {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in _KINDS:
        raise UserError(f"{paths[0]} is {_why_not(paths[0].name.lower())}")
    return _KINDS[kind](paths, options)


def _usual_layout(name: str) -> str:
    return next((kind for start, kind in _LAYOUT_OF_NAME.items() if name.startswith(start)), "")


def _matching_files(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    from braceexpand import braceexpand  # for patterns only

    try:
        patterns = list(braceexpand(pattern))
    except ValueError:  # braces that are no pattern
        patterns = [pattern]
    found = {each: sorted(glob(each)) for each in patterns}
    if missing := [each for each, names in found.items() if not names]:
        more = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        kind = "file" if Path(missing[0]).suffix else "image folder"
        raise UserError(f"no {kind} {missing[0]}{more}")
    return [
        Path(name) for name in dict.fromkeys(name for names in found.values() for name in names)
    ]


def _why_not(name: str) -> str:
    if name.endswith(_ARCHIVES):
        return "packed: unpack it, and give the folder or the .tar that comes out"
    if name.endswith(_OTHER_LISTS):
        return "no list that is read here: write one as .csv, with the columns path and label"
    return "no source: give a folder of images, or .tar, .parquet or .csv files"
