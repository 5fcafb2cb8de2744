"""What a tar of unknown origin holds, by our own list of what may be read.

Only headers are parsed here; no member's content is ever decoded by its extension, so a pickle or
a library in a tar is a line in a list of refusals and nothing more.
"""

import math
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scale_smog.data.images import IMAGE_EXTENSIONS
from scale_smog.data.manifest import UNLABELLED
from scale_smog.errors import UserError

LABEL_EXTENSION = "cls"
_IGNORED_EXTENSIONS = frozenset({"json", "txt"})  # descriptions, which nobody here reads


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


@dataclass(frozen=True)
class TarListing:
    """Samples in the tar's order, and what was refused: (member, reason)."""

    samples: tuple[TarSample, ...]
    refused: tuple[tuple[str, str], ...]


def list_tar(path: Path) -> TarListing:
    """Lists a tar; GNU long names and PAX names are understood.

    A truncated tar lists what is whole, and a refusal that says where it ends.

    Raises:
        UserError: the file cannot be read, or is no uncompressed tar.
    """
    members, refused = _safe_members(path)
    groups: dict[str, list[TarMember]] = {}
    for key, member in members:
        groups.setdefault(key, []).append(member)

    samples = []
    with open(path, "rb") as file:
        for key, group in groups.items():
            by_extension = {m.extension.lower(): m for m in group}
            images = [m for m in group if m.extension.lower() in IMAGE_EXTENSIONS]
            if len(images) != 1 or len(by_extension) < len(group):
                reason = f"its key has {len(images)} images" if len(images) != 1 else "duplicate"
                refused += [(m.name, f"{reason}: {key}") for m in group]
                continue
            label = by_extension.get(LABEL_EXTENSION)
            text = _content(file, label) if label else str(UNLABELLED).encode()
            try:
                samples.append(TarSample(key, images[0], int(text), tuple(group)))
            except ValueError:
                refused.append((images[0].name, f"its label is not a number: {text[:20]!r}"))
    return TarListing(tuple(samples), tuple(refused))


def _safe_members(path: Path) -> tuple[list[tuple[str, TarMember]], list[tuple[str, str]]]:
    """(key, member) of all that may be read, and (name, reason) of the rest."""
    members, refused = [], []
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            try:
                for info in tar:
                    key, member = split_name(info)
                    if reason := reason_to_refuse(info, member.extension.lower(), size):
                        refused.append((info.name, reason))
                    elif not info.isdir():
                        members.append((key, member))
            except tarfile.ReadError as error:
                refused.append((path.name, f"truncated tar: {error}"))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {path} as an uncompressed tar: {error}") from None
    return members, refused


def split_name(info: tarfile.TarInfo) -> tuple[str, TarMember]:
    """As webdataset does: the key ends at the first dot of the last part of the path."""
    folder, slash, base = info.name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", TarMember(extension, info.offset_data, info.size, info.name)


def reason_to_refuse(info: tarfile.TarInfo, extension: str, tar_size: float = math.inf) -> str:
    """Empty if the member may be read."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its path leaves the tar"
    if info.isdir():
        return ""
    if not info.isreg() or info.issparse():
        return "not a plain file: a link, a device or sparse"
    if extension not in IMAGE_EXTENSIONS | _IGNORED_EXTENSIONS | {LABEL_EXTENSION}:
        return f"not an image, label or description: .{extension}"
    if info.offset_data + info.size > tar_size:
        return "truncated: the tar ends inside it"
    return ""


def format_index(samples: Sequence[Sequence[TarMember]]) -> bytes:
    """The DALI index (v1.2) of a tar, byte for byte what DALI's own `wds2idx` writes."""
    lines = [
        " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members)
        for members in samples
    ]
    return "\n".join([f"v1.2 {len(samples)}", *lines, ""]).encode()


def _content(file, member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, 64))
