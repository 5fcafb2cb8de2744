"""The list of images put aside, and the share of them from which a dataset is refused."""

from collections.abc import Sequence
from pathlib import Path

from scale_smog.config import StrictModel
from scale_smog.errors import UserError
from scale_smog.runtime.files import write_atomically


class BadImage(StrictModel):
    """A line of the list."""

    file: str
    reason: str


def write_quarantine(
    out: Path, split: str, bad: Sequence[BadImage], num_images: int, max_bad: float
) -> None:
    """Writes `{split}-quarantine.jsonl`.

    Args:
        out: dataset folder.
        split: whose images these are.
        bad: images put aside.
        num_images: of the split, good and bad.
        max_bad: largest share of bad ones, 0 to 1.

    Raises:
        UserError: more of them are bad, or all are.
    """
    path = out / f"{split}-quarantine.jsonl"
    write_atomically(path, "".join(f"{image.model_dump_json()}\n" for image in bad).encode())
    if len(bad) > max_bad * num_images or len(bad) == num_images:
        raise UserError(
            f"{len(bad):,} of {num_images:,} images are bad, more than max_bad = {max_bad:g} "
            f"allows; see {path}, mend the source or raise --max-bad"
        )
