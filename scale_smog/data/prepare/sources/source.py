"""A source of images, whatever kind of input it is."""

from collections.abc import Callable
from dataclasses import dataclass

from scale_smog.data.images import ImageEntry


@dataclass(frozen=True)
class Source:
    """A list of images and how to read one; another kind of input is another such list.

    `read` maps an image's name to its encoded bytes. It runs in worker processes, so it must
    pickle.
    """

    classes: tuple[str, ...]
    images: tuple[ImageEntry, ...]
    read: Callable[[str], bytes]
    bad: tuple[tuple[str, str], ...] = ()  # (name, reason): images that are there, but of no use
    extra: tuple[tuple[str, str], ...] = ()  # (name, reason): what is no image, listed only
