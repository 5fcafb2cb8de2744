"""Tars that others made as sources."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_smog.data.images import BadImageError, ImageEntry
from scale_smog.data.labels import numbered_classes
from scale_smog.data.prepare.sources.source import Source
from scale_smog.data.tars import list_tar
from scale_smog.errors import UserError


def tar_source(paths: Sequence[Path]) -> Source:
    """Lists the images of tars in the webdataset convention; what is left out is listed.

    Labels are the numbers in `.cls` members, and the classes' names as well.

    Raises:
        UserError: a file is no uncompressed tar, or none has an image.
    """
    images, bad, extra = [], [], []
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    for path in paths:
        listing, tar = list_tar(path), path.absolute().relative_to(folder).as_posix()
        bad += [(f"{tar}#{name}", reason) for name, reason in listing.bad]
        extra += [(f"{tar}#{name}", reason) for name, reason in listing.extra]
        for sample in listing.samples:
            name = f"{tar}#{sample.image.offset}.{sample.image.size}.{sample.image.name}"
            images.append(ImageEntry(name, sample.label, sample.image.size))
    if not images:
        why = f"; {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(f"no images in {paths[0]}{why}")
    classes = numbered_classes(max(image.label for image in images) + 1)
    return Source(classes, tuple(images), _TarReader(folder), tuple(bad), tuple(extra))


@dataclass(frozen=True)
class _TarReader:
    folder: Path

    def __call__(self, name: str) -> bytes:
        file, _, place = name.partition("#")
        offset, size, _ = place.split(".", 2)
        try:
            with open(self.folder / file, "rb") as tar:
                tar.seek(int(offset))
                content = tar.read(int(size))
        except OSError as error:
            raise UserError(f"cannot read {self.folder / file}: {error.strerror}") from None
        if len(content) < int(size):
            raise BadImageError("truncated: the tar ends inside it")
        return content
