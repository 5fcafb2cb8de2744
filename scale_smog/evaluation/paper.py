"""The paper's results (SMoG, ECCV 2022, Tables 1 to 7) to set beside ours, where both are of the
same images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from scale_smog.config import Recipe
from scale_smog.runtime.stores import shown

DATA = Path(__file__).with_name("paper_tables.yaml")
TOLERANCE = 0.01  # of a number of images: a few may have been put aside
Cell = str | int | float | None


@dataclass(frozen=True)
class ImageCounts:
    """By what a dataset is recognised."""

    num_classes: int
    num_train: int
    num_test: int

    def is_like(self, other: "ImageCounts") -> bool:
        """Whether both are counts of one dataset."""
        pairs = ((self.num_train, other.num_train), (self.num_test, other.num_test))
        near = all(abs(a - b) <= TOLERANCE * b for a, b in pairs)
        return near and self.num_classes == other.num_classes

    def __str__(self) -> str:
        return (
            f"{self.num_classes:,} classes, {self.num_train:,} training and "
            f"{self.num_test:,} test images"
        )


@dataclass(frozen=True)
class Table:
    """A table as printed; the first column names the method."""

    source: str
    title: str
    evaluation: str
    dataset: str | None  # None: the one that the evaluation names
    backbones: Sequence[str]  # patterns
    widths: Sequence[int]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    epochs: int | None = None  # of all its rows
    note: str = ""


@dataclass(frozen=True)
class Ours:
    """What a result of ours is of.

    Attributes:
        evaluation: such as "linear".
        backbone: the recipe's.
        width: of a ResNet.
        epochs: of pre-training, up to the checkpoint.
        batch: images of a step of pre-training.
        num_small_crops: small views of an image in pre-training.
        start: what pre-training began with (`run.start_from`, `model.weights`); "": random weights.
        share: of the labels, for "finetune".
        dataset: "voc" or "cityscapes", for "segmentation".
        images: what it was evaluated on.
        results: fractions.
    """

    evaluation: str
    backbone: str
    width: int
    epochs: float
    batch: int
    num_small_crops: int
    start: str
    share: float
    dataset: str
    images: ImageCounts
    results: Mapping[str, Any]

    @classmethod
    def of_run(cls, recipe: Recipe, step: int, **result: Any) -> "Ours":
        """Of a run's `step`, and a `result`: evaluation, share, dataset, images and results."""
        return cls(
            backbone=recipe.model.backbone,
            width=recipe.model.width,
            epochs=step * recipe.data.global_batch / recipe.data.num_images,
            batch=recipe.data.global_batch,
            num_small_crops=recipe.data.num_small_crops,
            start=shown(recipe.start),
            **result,
        )

    def cells(self) -> dict[str, Cell]:
        """Our values by the names of the tables' columns, per cent."""
        about: dict[str, Cell] = {"model": "ours" + " †" * bool(self.num_small_crops)}
        about |= {"backbone": self.backbone, "width": f"x{self.width}", "batch": self.batch}
        about["epochs"] = round(self.epochs)
        numbers = {k: v for k, v in self.results.items() if isinstance(v, float)}
        return about | {self._column(key): 100 * value for key, value in numbers.items()}

    def _column(self, key: str) -> str:
        if self.evaluation == "finetune":
            return f"{key}_{100 * self.share:g}"
        return f"{self.dataset}_{key}" if self.evaluation == "segmentation" else key


@lru_cache
def load_tables() -> tuple[Table, ...]:
    """All of the paper's tables."""
    return tuple(Table(**table) for table in _data()["tables"])


def compare(ours: Ours) -> str:
    """The paper's tables for such a result with ours as their last row, or why there is none."""
    tables, reason = comparable_tables(ours)
    return "\n\n".join(_text(table, ours.cells()) for table in tables) or reason


def comparable_tables(ours: Ours) -> tuple[Sequence[Table], str]:
    """The paper's tables that such a result stands in, and why there is none."""
    tables = [table for table in load_tables() if _is_of(table, ours)]
    if not tables:
        return (), f"no comparison: the paper has no {_described(ours)}"
    if ours.start:
        return (), f"no comparison: the paper's nets began with random weights, not {ours.start}"
    known = _data()["datasets"][tables[0].dataset or ours.dataset]
    name, counts = known["name"], ImageCounts(**{k: known[k] for k in known if k != "name"})
    if not ours.images.is_like(counts):
        return (), (
            f"no comparison: the paper's rows are of {name} ({counts}), these images are others "
            f"({ours.images})"
        )
    return tables, ""


@lru_cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def _is_of(table: Table, ours: Ours) -> bool:
    if table.epochs and (round(ours.epochs) != table.epochs or ours.num_small_crops):
        return False
    return (
        table.evaluation == ours.evaluation
        and any(fnmatch(ours.backbone, pattern) for pattern in table.backbones)
        and ours.width in table.widths
        and (ours.evaluation != "finetune" or f"top1_{100 * ours.share:g}" in table.columns)
    )


def _described(ours: Ours) -> str:
    share = f" with {100 * ours.share:g} % of the labels" * (ours.evaluation == "finetune")
    width = f" x{ours.width}" * (ours.width > 1)
    return f"{ours.evaluation} results of {ours.backbone}{width}{share}"


def _text(table: Table, ours: Mapping[str, Cell]) -> str:
    rows = [*table.rows, [ours.get(column) for column in table.columns]]
    columns = [
        _aligned([name, *formatted(values)], is_text=number == 0)
        for number, (name, *values) in enumerate(
            zip(table.columns, *rows, strict=True)  # each column, its name first
        )
    ]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    note = [table.note] if table.note else []
    return "\n".join([f"{table.title}, per cent ({table.source})", *lines, *note])


def formatted(values: Sequence[Cell]) -> list[str]:
    """A column whose last value is ours, all with the digits that the paper prints."""
    printed = [value for value in values[:-1] if isinstance(value, float)]
    digits = max((len(str(value).partition(".")[2]) for value in printed), default=0)
    texts = [f"{value:.{digits}f}" if isinstance(value, float) else value for value in values]
    return ["–" if text is None else str(text) for text in texts]


def _aligned(cells: Sequence[str], is_text: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
