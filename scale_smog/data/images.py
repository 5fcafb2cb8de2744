"""One stored image: decoded in full, turned upright, in a form that every loader reads alike."""

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # a plan or a listing decodes nothing
    from PIL import Image

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
SMALLEST_DEEP_RANGE = 2**14  # of the brightest pixel of 16 bits: below lie sensors' 10 to 14 bits
_JPEG_QUALITY = 95
_ORIENTATION = 0x0112  # EXIF's tag
_PASS_THROUGH = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format: extension


class BadImageError(Exception):
    """An image that must not enter a shard; the message is the reason."""


class EncodedImage(NamedTuple):
    """An image as it enters a shard."""

    content: bytes
    extension: str  # jpg, png or webp
    width: int  # px
    height: int  # px


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image as a listing names it."""

    name: str  # relative to its source: part of the fingerprint and of the quarantine list
    label: int  # index into the source's classes, or -1
    num_bytes: int  # at the source; only plans the shards
    modified_ns: int = 0  # time of a file's last change


def fingerprint(images: Iterable[ImageEntry]) -> str:
    """Hex SHA-256 over names, labels and sizes: tells one list of images from another cheaply."""
    digest = hashlib.sha256()
    for image in images:
        line = f"{image.name}\0{image.label}\0{image.num_bytes}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Preprocessing:
    """What is done to images on their way into a shard."""

    full_check: bool = True  # decode every image, not only its header
    resize_shorter: int | None = None  # longest allowed shorter side, px; larger ones are shrunk
    reencode: int | None = None  # JPEG quality; all images become JPEGs of it


AS_STORED = Preprocessing(full_check=False)  # only what readers disagree about is changed


def decode(content: bytes, pixels: bool = True) -> "Image.Image":
    """Decodes an image in full, or its header only.

    Raises:
        BadImageError: the bytes are empty, truncated, damaged, not an image, or more than 178
            million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is raised; the rest names no file
            image = Image.open(BytesIO(content))  # refuses more than 178 million pixels
            if pixels:
                image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        raise BadImageError("not an image that Pillow can read") from None
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
    return image


def preprocess(content: bytes, options: Preprocessing = Preprocessing()) -> EncodedImage:
    """Checks an image and brings it into a form every decoder reads alike.

    8-bit RGB or grey JPEG, PNG and WebP without an EXIF orientation pass byte for byte. All else
    (CMYK, palette, alpha, 16 bit, animations, GIF, BMP, TIFF, ...) becomes an RGB JPEG with its
    orientation applied, because readers disagree about exactly these.

    Args:
        content: the encoded image.
        options: how much to check, and what to change.

    Raises:
        BadImageError: the image cannot be decoded or encoded.
    """
    from PIL import ImageOps

    image = decode(content, pixels=options.full_check)
    exif_is_readable = _has_readable_exif(image)
    shorter = options.resize_shorter or min(image.size)
    may_pass = options.reencode is None and min(image.size) <= shorter
    if may_pass and exif_is_readable and _reads_alike_everywhere(image, content):
        return EncodedImage(content, _PASS_THROUGH[str(image.format)], *image.size)
    try:
        if _has_deep_pixels(image, content):
            _require_full_range(image)
        if exif_is_readable:
            image = ImageOps.exif_transpose(image)
        image = _as_rgb(image)
        if min(image.size) > shorter:
            image = _shrink(image, shorter)
        encoded = BytesIO()
        image.save(encoded, "JPEG", quality=options.reencode or _JPEG_QUALITY, exif=b"")
    except MemoryError:
        raise
    except Exception as error:  # an image that was not decoded in full is decoded only here
        raise BadImageError(f"cannot become an RGB JPEG: {error}") from None
    return EncodedImage(encoded.getvalue(), "jpg", *image.size)


def _reads_alike_everywhere(image: "Image.Image", content: bytes) -> bool:
    if why_not_as_stored(image, content) or image.mode not in ("RGB", "L"):
        return False
    return image.getexif().get(_ORIENTATION, 1) == 1


def why_not_as_stored(image: "Image.Image", content: bytes) -> str:
    """Why some loader cannot decode an image as it lies in its file; "" if each can.

    Args:
        image: as `decode` returns it.
        content: its file.
    """
    if image.format not in _PASS_THROUGH:
        return f"a {image.format}"
    if getattr(image, "is_animated", False):
        return f"an animated {image.format}"
    return "16 bits a channel" if _has_deep_pixels(image, content) else ""


def _has_readable_exif(image: "Image.Image") -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.getexif().get(_ORIENTATION)
    except Exception:  # on damaged metadata Pillow raises nearly anything
        return False
    return True


def _has_deep_pixels(image: "Image.Image", content: bytes) -> bool:
    """Whether an image has 16 bits a channel, which Pillow does not tell of an RGB PNG."""
    if image.format == "PNG":
        return content[24] > 8  # the depth, in the header chunk
    return image.mode.startswith("I;16")


def _require_full_range(image: "Image.Image") -> None:
    """Refuses 16-bit pixels of fewer bits: 12 of them would keep 16 of 256 grey levels."""
    pixels = np.asarray(image)  # [H, W] uint16, or [H, W, C] uint8: their upper halves
    colours = pixels[..., :-1] if "A" in image.getbands() else pixels
    brightest = int(colours.max())
    if pixels.dtype == np.uint8:
        brightest = 256 * brightest + 255
    if 0 < brightest < SMALLEST_DEEP_RANGE:
        raise ValueError(
            f"its 16-bit pixels reach only {brightest:,} of 65,535: scale them to the full range"
        )


def _as_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range")
    return image.convert("RGB")


def _shrink(image: "Image.Image", shorter: int) -> "Image.Image":
    from PIL import Image

    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
