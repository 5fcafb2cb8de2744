"""Which of a folder's tars are of a split, as far as their names tell it."""

import re
import sys
from collections.abc import Sequence

from scale_smog.data.image_folder import split_kind
from scale_smog.errors import UserError, first_few

OWN_NAME = re.compile(r"(\w+)-\d+\.tar")  # {split}-000000.tar, as shards are named


def tars_of_split(folder: object, names: Sequence[str], split: str) -> list[str]:
    """The tars of a split among those of a folder: all, unless their names mean several splits.

    Of tars that are all named as `{split}-000000.tar` those of `split` are taken, and the others
    named on stderr.

    Args:
        folder: of the tars, for the error's line.
        names: of the tars.
        split: wanted.

    Raises:
        UserError: the names mean several splits, and none of them is `split` itself.
    """
    beginnings = _beginnings(names)
    if len(beginnings) < 2:
        return list(names)
    matches = [OWN_NAME.fullmatch(name) for name in names]
    own = [match[0] for match in matches if match and match[1] == split]
    if own and all(matches):
        left = first_few([name for name in names if name not in own])
        print(f"{folder}: not of the split {split}, and left out: {left}", file=sys.stderr)
        return own
    kind = split if split in beginnings else next(iter(beginnings))
    raise UserError(
        f"{folder} holds tars of the splits {', '.join(beginnings)}: name those of one by a quoted "
        f"pattern, as '{folder}/{beginnings[kind]}*.tar' --split {kind}"
    )


def _beginnings(names: Sequence[str]) -> dict[str, str]:
    """The splits that names of tars mean, with the beginning of the first name of each."""
    found: dict[str, str] = {}
    for name in names:
        for word in re.finditer(r"[^\W\d_]+", name.removesuffix(".tar")):
            if kind := split_kind(word[0]):
                found.setdefault(kind, name[: word.end()])
                break
    return found
