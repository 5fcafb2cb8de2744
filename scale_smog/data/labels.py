"""What a label may be, whichever kind of source names it."""

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from scale_smog.errors import UserError

UNLABELLED = -1
MAX_CLASSES = 1_000_000  # a manifest names every class: more are ids of something else

_WHOLE = re.compile(r"([+-]?)(\d+)(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)


def label_of(number: str | int | float) -> int:
    """The label that a whole number means; a negative one means none.

    Raises:
        ValueError: one line on what is wrong with it.
    """
    text = str(int(number) if isinstance(number, bool) else number).strip()
    match = _WHOLE.fullmatch(text)
    if not match:
        raise ValueError(f"its label is not a whole number: {text[:20]!r}")
    sign, digits = match[1], match[2].lstrip("0") or "0"
    if sign == "-" and digits != "0":
        return UNLABELLED
    if len(digits) > len(str(MAX_CLASSES)) or int(digits) >= MAX_CLASSES:
        raise ValueError(f"its label {text[:20]} is beyond {MAX_CLASSES:,} classes")
    return int(digits)


def numbered_classes(num_classes: int) -> tuple[str, ...]:
    """Names of classes that have none but their number."""
    return tuple(str(label) for label in range(num_classes))


def number_labels(
    labels: Sequence[Any], names: tuple[str, ...], images: Sequence[str]
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and each label's index into them.

    Args:
        labels: of the images: whole numbers, or names if any is one; None for none.
        names: of the numbers, where they have any.
        images: their names, for the error's line.

    Raises:
        UserError: a label is neither a whole number nor a name, or has no name.
    """
    if any(isinstance(label, str) for label in labels):
        texts = clean_names("" if label is None else str(label) for label in labels)
        classes = sorted_classes(texts)
        number = {name: index for index, name in enumerate(classes)}
        return classes, [number.get(text, UNLABELLED) for text in texts]
    numbers = []
    for image, label in zip(images, labels, strict=True):
        try:
            if label is None or label != label:  # pandas writes nan for no number
                numbers.append(UNLABELLED)
            else:
                numbers.append(label_of(label))
        except ValueError as error:
            raise UserError(f"{image}: {error}") from None
    largest = max(numbers)
    if names and largest >= len(names):
        image = images[numbers.index(largest)]
        raise UserError(f"{image}: label {largest}, but the file names {len(names)} classes")
    return names or numbered_classes(largest + 1), numbers


def clean_names(names: Iterable[str]) -> list[str]:
    """Labels as names of classes, without what the eye does not see; "": unlabelled.

    So is -1, and any negative number where all are numbers.
    """
    cleaned = [unicodedata.normalize("NFC", name.strip()) for name in names]
    numbers = {name: Decimal(name) for name in set(cleaned) if _NUMBER.fullmatch(name)}
    all_are_numbers = set(cleaned) <= {*numbers, ""}
    unlabelled = {
        name
        for name, value in numbers.items()
        if value == UNLABELLED or (all_are_numbers and value < 0)
    }
    return ["" if name in unlabelled else name for name in cleaned]


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names in order: by value where all are numbers, else as text."""
    distinct = sorted(set(names) - {""})
    if all(_NUMBER.fullmatch(name) for name in distinct):
        distinct.sort(key=Decimal)  # is stable: 01 stays before 1
    return tuple(distinct)


def say_unlabelled(source: str | Path, labels: Sequence[int] | np.ndarray) -> None:
    """A word on stderr where images have no label, which may be a mistake of their maker."""
    num = int(np.sum(np.asarray(labels) == UNLABELLED))
    if num:
        print(f"{source}: {num:,} of {len(labels):,} images have no label", file=sys.stderr)
