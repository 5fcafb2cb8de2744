"""The list of what is put aside, and the share of bad images from which a dataset is refused."""

import sys
from collections.abc import Sequence

from scale_smog.config import StrictModel
from scale_smog.errors import UserError
from scale_smog.runtime.files import printable
from scale_smog.runtime.stores import Folder, Store


class BadImage(StrictModel):
    """A line of the list."""

    file: str
    reason: str

    @classmethod
    def of(cls, file: str, reason: str) -> "BadImage":
        """A line for a file of any name."""
        return cls(file=printable(file), reason=printable(reason))


def write_quarantine(
    out: Folder | Store,
    split: str,
    bad: Sequence[BadImage],
    extra: Sequence[BadImage],
    num_images: int,
    max_bad: float,
) -> None:
    """Writes `{split}-quarantine.jsonl`.

    Args:
        out: dataset.
        split: whose images these are.
        bad: images put aside.
        extra: what is no image; it is listed, but does not count.
        num_images: of the split, good and bad.
        max_bad: largest share of bad ones, 0 to 1.

    Raises:
        UserError: more of them are bad, or all are, or there are none.
    """
    name = f"{split}-quarantine.jsonl"
    path = f"{out}/{name}"
    lines = "".join(f"{each.model_dump_json()}\n" for each in [*bad, *extra])
    out.write(name, lines.encode())
    if extra:
        print(
            f"{path}: {len(extra):,} members that are no images, such as {extra[0].file}: "
            f"{extra[0].reason}",
            file=sys.stderr,
        )
    if not num_images:
        raise UserError(f"no images in the split {split!r} of {out}")
    if len(bad) > max_bad * num_images or len(bad) == num_images:
        raise UserError(
            f"{len(bad):,} of {num_images:,} images are bad, such as {bad[0].file} "
            f"({bad[0].reason}), more than max_bad = {max_bad:g} allows; see {path}, mend the "
            "source or raise --max-bad"
        )
