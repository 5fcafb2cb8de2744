"""What a tar of unknown origin holds, by our own list of what may be read.

Only headers are parsed here; no member's content is ever decoded by its extension, so a pickle or
a library in a tar is a line in a list and nothing more.
"""

import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from scale_smog.data.images import IMAGE_EXTENSIONS
from scale_smog.data.labels import UNLABELLED, label_of
from scale_smog.errors import UserError

LABEL_EXTENSION = "cls"
MAX_LABEL_BYTES = 64
_IGNORED_EXTENSIONS = frozenset({"json", "txt"})  # descriptions, which nobody here reads
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class TarMember(NamedTuple):
    """One file inside a tar."""

    extension: str
    offset: int  # of the content, bytes
    size: int  # of the content, bytes
    name: str


class TarSample(NamedTuple):
    """One image of a tar, with the members that share its key."""

    key: str
    image: TarMember
    label: int  # UNLABELLED where the tar has none
    members: tuple[TarMember, ...]  # in the tar's order, the image among them


class Refused(NamedTuple):
    """A member, or a whole tar, that is not used."""

    name: str
    reason: str


@dataclass(frozen=True)
class TarListing:
    """Samples in the tar's order, and what was left out."""

    samples: tuple[TarSample, ...]
    bad: tuple[Refused, ...]  # samples, named by one of their members
    extra: tuple[Refused, ...]  # members that are no sample's image, label or description


def list_tar(path: Path) -> TarListing:
    """Lists a tar; GNU long names, PAX names and tars joined by `cat` are understood.

    A truncated tar lists what is whole, and a refusal that says where it ends.

    Raises:
        UserError: the file cannot be read, or is no uncompressed tar.
    """
    members, unsafe, cut = _members_by_key(path)
    samples, bad, extra = [], cut, []
    with open(path, "rb") as file:
        for key in members | unsafe:
            group, refused = members.get(key, []), unsafe.get(key, [])
            try:
                if any(each.name.lower().endswith(f".{LABEL_EXTENSION}") for each in refused):
                    raise ValueError(f"its label cannot be read: {key}")
                samples.append(_sample(file, key, group))
            except ValueError as error:
                if reason := _why_bad(group, refused, str(error)):
                    bad.append(reason)
                    refused = [r for r in refused if r != reason]
            extra += refused
    return TarListing(tuple(samples), tuple(bad), tuple(extra))


def _sample(file: IO[bytes], key: str, group: list[TarMember]) -> TarSample:
    """The members of a key as a sample.

    Raises:
        ValueError: they are none; the message is the reason.
    """
    by_extension = {m.extension.lower(): m for m in group}
    images = [m for m in group if m.extension.lower() in IMAGE_EXTENSIONS]
    if len(by_extension) < len(group):
        raise ValueError(f"duplicate: {key}")
    if len(images) != 1:
        raise ValueError(f"its key has {len(images)} images: {key}")
    label = by_extension.get(LABEL_EXTENSION)
    number = label_of(_content(file, label)) if label else UNLABELLED
    return TarSample(key, images[0], number, tuple(group))


def _why_bad(group: list[TarMember], refused: list[Refused], reason: str) -> Refused | None:
    """One line for a key without a sample; None where it was never meant to be one."""
    if images := [member for member in group if member.extension.lower() in IMAGE_EXTENSIONS]:
        return Refused(images[0].name, reason)
    if lost := [each for each in refused if _looks_like_image(each.name)]:
        return lost[0]
    labels = [member for member in group if member.extension.lower() == LABEL_EXTENSION]
    return Refused(labels[0].name, reason) if labels else None


def _looks_like_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _members_by_key(
    path: Path,
) -> tuple[dict[str, list[TarMember]], dict[str, list[Refused]], list[Refused]]:
    """Members that may be read and the rest, both by their key; and where the tar is cut short."""
    members, unsafe, cut = {}, {}, []
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            try:
                for info in _headers(file):
                    key, member = split_name(info)
                    if reason := reason_to_refuse(info, member.extension.lower(), size):
                        unsafe.setdefault(key, []).append(Refused(info.name, reason))
                    elif not info.isdir():
                        members.setdefault(key, []).append(member)
            except tarfile.ReadError as error:
                if not members and not unsafe:
                    raise
                cut.append(Refused(path.name, f"truncated or damaged tar: {error}"))
    except (tarfile.TarError, OSError) as error:
        hint = _compression(path)
        raise UserError(f"cannot read {path} as an uncompressed tar: {error}{hint}") from None
    return members, unsafe, cut


def _headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """All headers of a file, also of tars that follow the first one's end.

    Raises:
        tarfile.ReadError: one is damaged, or the file ends too early.
    """
    while True:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes it for the end
            raise tarfile.ReadError(f"no header at byte {end:,}, the rest is not read")
        if not _skip_zeros(file):
            return


def _skip_zeros(file: IO[bytes]) -> bool:
    """Moves to the next block that is not empty; False at the end of the file."""
    while block := file.read(2**20):
        if content := block.lstrip(b"\0"):
            ahead = len(content)
            position = file.tell() - ahead
            file.seek(position - position % tarfile.BLOCKSIZE)
            return True
    return False


def _compression(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:
        return ""
    kinds = [kind for magic, kind in _COMPRESSIONS.items() if start.startswith(magic)]
    return f"; it is compressed by {kinds[0]}: unpack it first" if kinds else ""


def split_name(info: tarfile.TarInfo) -> tuple[str, TarMember]:
    """As webdataset does: the key ends at the first dot of the last part of the path."""
    folder, slash, base = info.name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", TarMember(extension, info.offset_data, info.size, info.name)


def reason_to_refuse(info: tarfile.TarInfo, extension: str, tar_size: float = math.inf) -> str:
    """Empty if the member may be read."""
    base = info.name.rpartition("/")[2]
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its path leaves the tar: write it without a leading / and .."
    if info.isdir():
        return ""
    if not info.isreg() or info.issparse():
        return "not a plain file: a link, a device or sparse"
    if base.startswith("."):
        return "a hidden file"
    if extension not in IMAGE_EXTENSIONS | _IGNORED_EXTENSIONS | {LABEL_EXTENSION}:
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return f"a key ends at its first dot, so this is no image but a .{extension}: rename it"
        return f"not an image, label or description: .{extension}"
    if info.offset_data + info.size > tar_size:
        return "truncated: the tar ends inside it"
    return ""


def format_index(samples: Sequence[Sequence[TarMember]]) -> bytes:
    """The DALI index (v1.2) of a tar, byte for byte what DALI's own `wds2idx` writes.

    But for names with blanks, at which DALI would split them: it only reports names, so there
    they have underscores.
    """
    lines = [
        " ".join(f"{m.extension} {m.offset} {m.size} {'_'.join(m.name.split())}" for m in members)
        for members in samples
    ]
    return "\n".join([f"v1.2 {len(samples)}", *lines, ""]).encode("utf-8", "surrogateescape")


def _content(file: IO[bytes], member: TarMember) -> str:
    file.seek(member.offset)
    content = file.read(min(member.size, MAX_LABEL_BYTES + 1))
    if len(content) > MAX_LABEL_BYTES:
        raise ValueError(f"its label is not a whole number: it has {member.size:,} bytes")
    return content.decode("ascii", "backslashreplace")
