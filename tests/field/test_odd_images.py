"""Image files as people have them: each kind, and what comes of it."""

import struct
import tracemalloc
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from field_sets import indexed, quarantine, refusal, samples, sharded, write_images, write_tar
from images import jpeg, photo
from PIL import Image

from scale_smog.data.datasets import open_split
from scale_smog.data.images import BadImageError, preprocess
from scale_smog.data.loaders.torch import decode

GOOD = 40


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(content: bytes) -> np.ndarray:
    """[H, W, 3] of an image as it comes out of a shard."""
    return np.asarray(Image.open(BytesIO(preprocess(content).content)).convert("RGB"))


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(values: np.ndarray, colour: int, *chunks: bytes) -> bytes:
    """A PNG of any depth and kind of colour, with chunks of one's own before the pixels."""
    height, width = values.shape[:2]
    depth = 8 * values.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body += b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


RGB = np.asarray(photo(20, 16, 0))
TIFF = b"II*\0\x08\0\0\0"


def with_exif(kind: str, exif: bytes) -> bytes:
    return encoded(photo(20, 16, 0), kind, exif=exif)


def raw_profile(text: bytes) -> bytes:
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


# Metadata that nobody can read, in sound pictures.
METADATA = {
    "png: not EXIF at all": png(RGB, 2, chunk(b"eXIf", b"garbage")),
    "png: empty": png(RGB, 2, chunk(b"eXIf", b"")),
    "png: cut short": png(RGB, 2, chunk(b"eXIf", TIFF + b"\xff\xff")),
    "png: a table beyond its end": png(RGB, 2, chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f")),
    "png: an entry beyond its end": png(
        RGB, 2, chunk(b"eXIf", TIFF + struct.pack("<HHHII", 1, 0x112, 3, 1 << 30, 1 << 30))
    ),
    "png: a text in place of a number": png(
        RGB, 2, chunk(b"eXIf", TIFF + struct.pack("<HHHI4s", 1, 0x112, 2, 4, b"abc\0"))
    ),
    "png: a hex profile that is no hex": png(RGB, 2, raw_profile(b"\nexif\n  10\nzz zz\n")),
    "png: a hex profile cut short": png(RGB, 2, raw_profile(b"\nexif\n")),
    "jpeg: not EXIF at all": with_exif("JPEG", b"Exif\0\0garbage"),
    "jpeg: cut short": with_exif("JPEG", b"Exif\0\0" + TIFF),
    "jpeg: an entry beyond its end": with_exif(
        "JPEG", b"Exif\0\0" + TIFF + struct.pack("<HHHII", 1, 0x112, 3, 1 << 30, 1 << 30)
    ),
    "webp: not EXIF at all": with_exif("WEBP", b"garbage!"),
    "webp: cut short": with_exif("WEBP", b"Exif\0\0" + TIFF + b"\xff"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_unreadable_metadata_costs_no_picture(tmp_path, kind):
    content = METADATA[kind]
    expected = np.asarray(Image.open(BytesIO(content)).convert("RGB"), float)
    assert np.abs(pixels(content) - expected).mean() < 12
    write_images(tmp_path / "set", [f"{i}.jpg" for i in range(3)])
    (tmp_path / "set" / "x.jpg").write_bytes(content)
    assert sharded(tmp_path / "set", tmp_path / "out").num_samples == 4
    (tmp_path / "set").rename(tmp_path / "train")
    folder = open_split(tmp_path, "train")
    assert all(folder.read(i) for i in range(4))


@pytest.mark.parametrize("kind", METADATA)
def test_unreadable_metadata_costs_no_picture_of_others_tars(tmp_path, kind):
    ending = {"jpeg": "jpg"}.get(kind.partition(":")[0], kind.partition(":")[0])
    write_tar(tmp_path / "a.tar", {**samples("01"), f"x.{ending}": METADATA[kind]})
    assert indexed(tmp_path).num_samples == 3


def ramp(top: int, shape: tuple[int, ...] = (16, 20)) -> np.ndarray:
    """16-bit values from 0 to `top`."""
    return np.linspace(0, top, int(np.prod(shape))).reshape(shape).astype(np.uint16)


def with_full_alpha(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)


GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # of the PNG format
# 16-bit pixels that hold fewer bits.
SHALLOW = {
    "8 bits": png(ramp(255), GREY),
    "10 bits": png(ramp(1023), GREY),
    "12 bits": png(ramp(4095), GREY),
    "14 bits": png(ramp(16383), GREY),
    "12 bits in TIFF": encoded(Image.fromarray(ramp(4095)), "TIFF"),
    "12 bits of colour": png(ramp(4095, (16, 20, 3)), COLOUR),
    "8 bits of colour": png(ramp(255, (16, 20, 3)), COLOUR),
    "12 bits of colour under an alpha of 16": png(
        with_full_alpha(ramp(4095, (16, 20, 3))), COLOUR_ALPHA
    ),
    "12 bits of grey under an alpha of 16": png(
        with_full_alpha(ramp(4095, (16, 20, 1))), GREY_ALPHA
    ),
}


@pytest.mark.parametrize("kind", SHALLOW)
def test_16_bit_pixels_of_fewer_bits_are_refused_with_their_range(tmp_path, kind):
    with pytest.raises(BadImageError, match=r"reach only [\d,]+ of 65,535: scale them"):
        preprocess(SHALLOW[kind])
    write_images(tmp_path / "set", [f"{i}.jpg" for i in range(GOOD)])
    (tmp_path / "set" / "x.png").write_bytes(SHALLOW[kind])
    assert sharded(tmp_path / "set", tmp_path / "out").num_samples == GOOD
    assert list(quarantine(tmp_path / "out")) == ["x.png"]


# 16-bit pixels that hold 16.
DEEP = {
    "16 bits": png(ramp(65535), GREY),
    "a dim picture": png(ramp(20000), GREY),
    "12 bits moved to the top": png(ramp(4095) * 16, GREY),
    "black": png(ramp(0), GREY),
    "16 bits in TIFF": encoded(Image.fromarray(ramp(65535)), "TIFF"),
    "16 bits of colour": png(ramp(65535, (16, 20, 3)), COLOUR),
}


@pytest.mark.parametrize("kind", DEEP)
def test_16_bit_pixels_of_16_bits_keep_their_levels(kind):
    content = DEEP[kind]
    top = np.asarray(Image.open(BytesIO(content))).max()
    top = top / 256 if top > 255 else top
    assert abs(pixels(content).max() - top) < 8


def test_a_dataset_of_12_bits_is_refused_in_one_line_that_leads_to_the_reason(tmp_path):
    write_images(tmp_path / "set", ["0.jpg"])
    for i in range(3):
        (tmp_path / "set" / f"{i}.png").write_bytes(SHALLOW["12 bits"])
    line = refusal(sharded, tmp_path / "set", tmp_path / "out")
    assert "3 of 4 images are bad" in line and "train-quarantine.jsonl" in line
    assert "4,095 of 65,535" in quarantine(tmp_path / "out")["0.png"]


def animation(kind: str) -> bytes:
    frames = [photo(20, 16, i) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def ycck() -> bytes:
    """A JPEG of four inverted channels behind Adobe's mark, as print shops have them."""
    return encoded(photo(20, 16, 0).convert("CMYK"), "JPEG", quality=95)


def translucent(mode: str) -> Image.Image:
    image = photo(20, 16, 0).convert("RGBA" if mode != "LA" else "LA")
    image.putalpha(Image.linear_gradient("L").resize((20, 16)))
    return image.convert(mode)


def png_of_bits(bits: int) -> bytes:
    return encoded(
        photo(20, 16, 0).convert("L").point(lambda x: x >> (8 - bits)).convert("P"), "PNG"
    )


# Odd pictures that are kept: content, and the size they have.
KEPT = {
    "CMYK": (ycck(), (20, 16)),
    "two pictures in one JPEG (MPO)": (animation("MPO"), (20, 16)),
    "an animated WebP": (animation("WEBP"), (20, 16)),
    "an animated PNG": (animation("PNG"), (20, 16)),
    "an animated GIF": (animation("GIF"), (20, 16)),
    "a TIFF of several pages": (animation("TIFF"), (20, 16)),
    "a progressive JPEG": (encoded(photo(20, 16, 0), "JPEG", progressive=True), (20, 16)),
    "a grey JPEG": (encoded(photo(20, 16, 0).convert("L"), "JPEG"), (20, 16)),
    "a JPEG with rubbish behind it": (jpeg(20, 16, 0) + b"rubbish" * 100, (20, 16)),
    "one pixel": (encoded(photo(1, 1, 0), "PNG"), (1, 1)),
    "a line of pixels": (encoded(photo(1, 3000, 0), "PNG"), (1, 3000)),
    "one bit a pixel": (encoded(photo(20, 16, 0).convert("1"), "PNG"), (20, 16)),
    "one bit a pixel in TIFF": (
        encoded(photo(20, 16, 0).convert("1"), "TIFF", compression="group4"),
        (20, 16),
    ),
    "two bits a pixel": (png_of_bits(2), (20, 16)),
    "alpha": (encoded(translucent("RGBA"), "PNG"), (20, 16)),
    "grey with alpha": (encoded(translucent("LA"), "PNG"), (20, 16)),
    "a transparent colour": (encoded(photo(20, 16, 0), "PNG", transparency=(1, 2, 3)), (20, 16)),
    "an interlaced palette": (encoded(photo(20, 16, 0).convert("P"), "GIF", interlace=1), (20, 16)),
    "a colour profile": (encoded(photo(20, 16, 0), "JPEG", icc_profile=b"x" * 200_000), (20, 16)),
    "a long comment": (encoded(photo(20, 16, 0), "JPEG", comment=b"x" * 60_000), (20, 16)),
    "a PNG by the name of a JPEG": (encoded(photo(20, 16, 0), "PNG"), (20, 16)),
    "a BMP upside down": (encoded(photo(20, 16, 0), "BMP"), (20, 16)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_odd_pictures_are_kept_as_all_loaders_read_them(tmp_path, kind):
    content, size = KEPT[kind]
    image = preprocess(content)
    stored = Image.open(BytesIO(image.content))
    assert (image.width, image.height) == stored.size == size
    assert stored.mode in ("RGB", "L") and not getattr(stored, "is_animated", False)
    decoded = decode(np.frombuffer(image.content, np.uint8))  # by torchvision
    assert tuple(decoded.shape) == (3, size[1], size[0])
    original = np.asarray(Image.open(BytesIO(content)).convert("RGB"), float)
    if min(size) > 1:
        assert (
            np.abs(np.asarray(stored.convert("RGB"), float) - original).mean() < 20
        )  # a palette's dots


def text_bomb() -> bytes:
    """80 MB of blanks in a compressed text chunk."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 80_000_000, 9))
    return png(RGB, 2, text)


def pixel_bomb(side: int) -> bytes:
    """A PNG of `side` pixels squared, of which no pixel is there."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# Files that are put aside, each with a reason.
PUT_ASIDE = {
    "a progressive JPEG cut short": encoded(photo(99, 99, 0), "JPEG", progressive=True)[:-300],
    "a JPEG of its header alone": jpeg(20, 16, 0)[:200],
    "an animated WebP cut short": animation("WEBP")[:-200],
    "a JPEG that turns to zeros": jpeg(99, 99, 0)[:700] + bytes(900),
    "a PNG with a wrong checksum": png(RGB, 2)[:-20] + b"\0\0\0\0" + png(RGB, 2)[-16:],
    "a text that takes 80 MB": text_bomb,  # not made before a test asks: compressing takes a while
    "more pixels than any picture": pixel_bomb(100_000),
    "pixels that are not there": pixel_bomb(4000),
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "32-bit pixels": encoded(Image.fromarray(np.full((16, 20), 70_000, np.int32)), "TIFF"),
    "pixels of floats": encoded(Image.fromarray(np.ones((16, 20), np.float32)), "TIFF"),
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("kind", PUT_ASIDE)
def test_what_is_no_sound_picture_is_put_aside_with_a_reason(tmp_path, kind):
    write_images(tmp_path / "set", [f"{i}.jpg" for i in range(GOOD)])
    content = PUT_ASIDE[kind]
    (tmp_path / "set" / "x.jpg").write_bytes(content() if callable(content) else content)
    assert sharded(tmp_path / "set", tmp_path / "out").num_samples == GOOD
    (reason,) = quarantine(tmp_path / "out").values()
    assert reason and "0x" not in reason and "\n" not in reason


def test_a_bomb_costs_little_memory(tmp_path):
    """64 MiB beside what is there, for files that would take gigabytes."""
    limit = 64 * 2**20
    for content in (text_bomb(), pixel_bomb(100_000)):
        tracemalloc.start()
        with pytest.raises(BadImageError):
            preprocess(content)
        assert tracemalloc.get_traced_memory()[1] < limit
        tracemalloc.stop()
