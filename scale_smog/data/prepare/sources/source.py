"""A source of images, whatever kind of input it is."""

from collections.abc import Callable
from dataclasses import dataclass

from scale_smog.data.images import ImageEntry


@dataclass(frozen=True)
class Source:
    """A list of images and how to read one; another kind of input is another such list.

    `read` maps an image's name to its encoded bytes. It runs in worker processes, so it must
    pickle. Where images are only read many at a time, `blocks` says which ones together: a shard
    takes whole blocks, in random order, as far as it can.
    """

    classes: tuple[str, ...]
    images: tuple[ImageEntry, ...]
    read: Callable[[str], bytes]
    bad: tuple[tuple[str, str], ...] = ()  # (name, reason): images that are there, but of no use
    extra: tuple[tuple[str, str], ...] = ()  # (name, reason): what is no image, listed only
    blocks: tuple[int, ...] = ()  # of each image, 0 to their number - 1; (): each alone


@dataclass(frozen=True)
class SourceOptions:
    """What is said about a source besides its name; "": what is usual."""

    layout: str = ""  # imagenet or cifar10: an archive as its makers publish it
    split: str = "train"  # of an archive, or a folder of tars, that holds several
    labels: str = ""  # file that names the classes of ImageNet's validation images
    image_column: str = ""  # of parquet
    label_column: str = ""  # of parquet
    label_key: str = ""  # of the .json members of tars


AS_USUAL = SourceOptions()
