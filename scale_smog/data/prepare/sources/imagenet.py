"""ImageNet-1k as its makers publish it: tars in a tar, and validation images without labels."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from scale_smog.data.images import ImageEntry
from scale_smog.data.prepare.sources.source import Source, SourceOptions
from scale_smog.data.prepare.sources.tar import TarReader
from scale_smog.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
_WNID = re.compile(r"n\d{8}")


def imagenet_source(path: Path, options: SourceOptions) -> Source:
    """Lists ILSVRC2012_img_train.tar, which holds a tar for each class, or ILSVRC2012_img_val.tar.

    Classes are WordNet ids in order. Those of validation images come from the devkit beside the
    tar, or from `options.labels`: the devkit, or a list with a name and a WordNet id a line
    (divided by blanks or a comma; more may follow), or with a WordNet id for each image in the
    order of their names.

    Raises:
        UserError: the tar cannot be read or is another one, or its labels are missing.
    """
    with _readable(path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = [info for info in tar if info.isreg()]
        if not members:
            raise UserError(f"{path} is empty")
        if members[0].name.endswith(".tar"):
            images = list(_images_of_classes(file, members))
        else:
            images = [(info.name, info.offset_data, info.size, "") for info in members]
    if not members[0].name.endswith(".tar"):
        images = _with_classes(path, images, options.labels)
    classes = tuple(sorted({wnid for *_, wnid in images}))
    number = {wnid: label for label, wnid in enumerate(classes)}
    entries = tuple(
        ImageEntry(f"{path.name}#{offset}.{size}.{name}", number[wnid], size)
        for name, offset, size, wnid in images
    )
    return Source(classes, entries, TarReader(path.absolute().parent))


_Image = tuple[str, int, int, str]  # name, place in the file, bytes, WordNet id


def _images_of_classes(file: IO[bytes], members: list[tarfile.TarInfo]) -> Iterator[_Image]:
    """The images in the tars of the classes, with their places in the outer tar."""
    for outer in members:
        wnid = outer.name.rpartition("/")[2].removesuffix(".tar")
        if not _WNID.fullmatch(wnid):
            raise UserError(f"{file.name}: {outer.name} is not the tar of a WordNet id")
        file.seek(outer.offset_data)
        with tarfile.open(fileobj=_Part(file, outer), mode="r:") as tar:  # type: ignore[arg-type]
            for info in tar:
                if info.isreg():
                    yield info.name, outer.offset_data + info.offset_data, info.size, wnid


class _Part:
    """A member of a tar as a file of its own, for tarfile."""

    def __init__(self, file: IO[bytes], member: tarfile.TarInfo) -> None:
        self._file, self._start, self._size = file, member.offset_data, member.size
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._position
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


def _with_classes(path: Path, images: list[_Image], labels: str) -> list[_Image]:
    """The validation images with their WordNet ids."""
    source = Path(labels) if labels else path.with_name(DEVKIT)
    if not source.exists():
        raise UserError(
            f"the images of {path} have no labels: put {DEVKIT} beside it, or give --labels FILE "
            "with a name and a WordNet id a line"
        )
    names = sorted(name for name, *_ in images)
    wnid_of = _wnids_of_devkit(source, names) if _is_packed(source) else _wnids(source, names)
    if missing := [name for name in names if name not in wnid_of]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source} does not name {missing[0]}{others}")
    return [(name, offset, size, wnid_of[name]) for name, offset, size, _ in images]


def _is_packed(source: Path) -> bool:
    return source.name.endswith((".tar.gz", ".tgz", ".tar"))


def _wnids(source: Path, names: list[str]) -> dict[str, str]:
    """Of a plain list: `name wnid ...` or `wnid` a line."""
    with _readable(source):
        lines = [re.split(r"[\s,]+", line.strip()) for line in source.read_text().splitlines()]
    alone = [line[0] for line in lines if len(line) == 1 and _WNID.fullmatch(line[0])]
    if alone:
        _require_one_each(source, len(alone), names)
        return dict(zip(names, alone, strict=True))
    pairs = [line for line in lines if len(line) > 1 and _WNID.fullmatch(line[1])]
    by_stem = {name.rpartition("/")[2].partition(".")[0]: wnid for name, wnid, *_ in pairs}
    stems = {name: name.rpartition("/")[2].partition(".")[0] for name in names}
    return {name: by_stem[stem] for name, stem in stems.items() if stem in by_stem}


def _wnids_of_devkit(source: Path, names: list[str]) -> dict[str, str]:
    """Of the devkit: numbers in the order of the images' names, and what they mean."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"reading {source} needs scipy: pip install scipy, or give --labels FILE with a name "
            "and a WordNet id a line"
        ) from None
    with _readable(source), tarfile.open(source) as devkit:
        found = {
            info.name.rpartition("/")[2]: file
            for info in devkit
            if info.isreg() and (file := devkit.extractfile(info))
        }
        if missing := {GROUND_TRUTH, META} - set(found):
            raise UserError(f"{source} holds no {min(missing)}")
        numbers = [int(line) for line in found[GROUND_TRUTH].read().split()]
        synsets = loadmat(found[META], squeeze_me=True)["synsets"]
    _require_one_each(source, len(numbers), names)
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    if unknown := set(numbers) - set(wnids):
        raise UserError(f"{source}: {META} does not know the number {min(unknown)}")
    return {name: wnids[number] for name, number in zip(names, numbers, strict=True)}


def _require_one_each(source: Path, num: int, names: list[str]) -> None:
    if num != len(names):
        raise UserError(f"{source} has {num:,} labels for {len(names):,} images")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
