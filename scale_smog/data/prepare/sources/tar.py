"""Tars that others made as sources."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_smog.data.images import BadImageError, ImageEntry
from scale_smog.data.prepare.sources.source import Source
from scale_smog.data.tars import list_tar
from scale_smog.errors import UserError


def tar_source(paths: Sequence[Path]) -> Source:
    """Lists the images of tars in the webdataset convention; what is refused is quarantined.

    Labels are the numbers in `.cls` members, and the classes' names as well.

    Raises:
        UserError: a file is no uncompressed tar, or none has an image.
    """
    images, refused = [], []
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        listing, tar = list_tar(path), path.relative_to(folder).as_posix()
        refused += [(f"{tar}#{name}", reason) for name, reason in listing.refused]
        for sample in listing.samples:
            name = f"{tar}#{sample.image.offset}.{sample.image.size}.{sample.image.name}"
            images.append(ImageEntry(name, sample.label, sample.image.size))
    if not images:
        raise UserError(f"no images in {paths[0]}" + (f": {refused[0]}" if refused else ""))
    num_classes = max(image.label for image in images) + 1
    classes = tuple(str(label) for label in range(num_classes))
    return Source(classes, tuple(images), _TarReader(folder), tuple(refused))


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
