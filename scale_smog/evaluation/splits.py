"""The training and the test split of a dataset, with the labels that evaluations need."""

import numpy as np

from scale_smog import distributed
from scale_smog.data.datasets import Images, has_labels, has_split
from scale_smog.data.loaders.build import open_together
from scale_smog.errors import UserError


class CannotEvaluate(UserError):
    """The dataset has no test split with labels of the training images' classes; it trains."""


def named_splits(path: str, purpose: str, train: Images | None = None) -> dict[str, Images]:
    """The training and then the test split, each by its name; a collective.

    Args:
        path: of the dataset.
        purpose: that needs labels, for the error's line.
        train: the training split, if it is open: of a large folder that takes minutes.

    Raises:
        UserError: one is missing, has no labels, or their classes differ.
    """
    name = distributed.call_on_main(lambda: test_split(path, purpose))
    train = open_together(path, "train") if train is None else train
    test = open_together(path, name)
    require_labels(train, path, purpose)
    require_same_classes(train, test, path)
    return {"train": train, name: test}


def test_split(path: str, purpose: str = "an evaluation") -> str:
    """The split to test on: the first of "test" and "val" whose images all have labels.

    Args:
        path: of the dataset.
        purpose: that needs labels, for the error's line.

    Raises:
        CannotEvaluate: the dataset has neither, or labels for neither.
    """
    names = [name for name in ("test", "val") if has_split(path, name)]
    if not names:
        raise CannotEvaluate(
            f"{path} has no split 'test' or 'val' to evaluate on: name a folder with train/ and "
            "test/ in it, which may be links"
        )
    for name in names:
        if has_labels(path, name):
            return name
    raise CannotEvaluate(
        f"{purpose} needs labels, and {path} has images without one in {' and in '.join(names)}"
    )


def require_labels(dataset: Images, path: str, purpose: str) -> None:
    """Raises `CannotEvaluate` unless every image of the training split has a label."""
    if (dataset.labels < 0).any():
        raise CannotEvaluate(f"{purpose} needs labels, and {path} has images without one in train")


def require_same_classes(train: Images, test: Images, path: str) -> None:
    """Raises `CannotEvaluate` unless both splits name the same classes."""
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise CannotEvaluate(
            f"{path}: the classes of the training and the test images do not match: {odd[0]}"
            + f" and {len(odd) - 1} more" * (len(odd) > 1)
        )


def random_subset(num_samples: int, num_wanted: int) -> np.ndarray:
    """A draw of so many sample ids, ascending, the same each time; 0 or too many wanted: all."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(num_samples)
    return np.sort(order[: num_wanted or None])  # no prefix: a folder's images come by class
