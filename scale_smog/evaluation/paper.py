"""Published figures to set beside ours: SMoG's (ECCV 2022, Tables 1 to 6) and other methods'.

In per cent. SMoG's rows are the paper's; the others' are those of their own papers, but for COCO
and segmentation, where the paper names its source.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One line of a table; values in the order of the table's columns, None where not given."""

    method: str
    values: tuple[float | None, ...]


class Table(NamedTuple):
    """A table of the paper: its columns are keys of our results, our fractions times 100."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]


LINEAR_R50 = Table(
    "linear, ImageNet-1k, ResNet-50",
    ("top1", "top5"),
    (
        Row("supervised", (76.5, None)),
        Row("SimCLR, 1000 epochs", (69.3, 89.0)),
        Row("MoCo v2, 800 epochs", (71.1, 90.1)),
        Row("SimSiam, 800 epochs", (71.3, None)),
        Row("Barlow Twins, 1000 epochs", (73.2, 91.0)),
        Row("BYOL, 1000 epochs", (74.3, 91.6)),
        Row("SwAV, multi-crop, 800 epochs", (75.3, None)),
        Row("DINO, multi-crop, 800 epochs", (75.3, None)),
        Row("SMoG, 100 epochs", (67.2, None)),
        Row("SMoG, 400 epochs, batch 2048", (73.6, 91.3)),
        Row("SMoG, 800 epochs", (74.5, 91.9)),
        Row("SMoG, multi-crop, 400 epochs", (76.4, 93.1)),
    ),
)
LINEAR_WIDE = {
    2: Row("SMoG, ResNet-50 x2", (78.0, 93.9)),
    4: Row("SMoG, ResNet-50 x4", (79.0, 94.4)),
}
LINEAR_SWIN = Table(
    "linear, ImageNet-1k, Swin-T",
    ("top1", "top5"),
    (
        Row("MoBY, 300 epochs", (75.3, None)),
        Row("SMoG", (74.5, None)),
        Row("SMoG, multi-crop", (77.7, None)),
    ),
)
FINETUNE_1, FINETUNE_10, FINETUNE_100 = (
    Table(f"semi-supervised, ImageNet-1k, ResNet-50, {share} % of the labels", ("top1",), rows)
    for share, rows in (
        (
            1,
            (
                Row("supervised", (25.4,)),
                Row("SimCLR", (48.3,)),
                Row("BYOL", (53.2,)),
                Row("SwAV", (53.9,)),
                Row("Barlow Twins", (55.0,)),
                Row("NNCLR", (56.4,)),
                Row("SMoG", (58.0,)),
                Row("SMoG, x2", (63.6,)),
            ),
        ),
        (
            10,
            (
                Row("supervised", (56.4,)),
                Row("SimCLR", (65.6,)),
                Row("BYOL", (68.8,)),
                Row("Barlow Twins", (69.7,)),
                Row("NNCLR", (69.8,)),
                Row("SwAV", (70.2,)),
                Row("SMoG", (71.2,)),
                Row("SMoG, x2", (74.4,)),
            ),
        ),
        (100, (Row("SMoG", (78.3,)), Row("SMoG, x2", (80.2,)))),
    )
)
VOC = Table(
    "FCN, VOC 2012, ResNet-50",
    ("miou",),
    (Row("supervised", (73.59,)), Row("SwAV", (74.97,)), Row("SMoG", (76.22,))),
)
CITYSCAPES = Table(
    "FCN, Cityscapes, ResNet-50",
    ("miou",),
    (Row("supervised", (73.83,)), Row("SMoG", (76.03,))),
)
COCO = Table(
    "Mask R-CNN, COCO, ResNet-50 FPN, 1x",
    ("box_ap", "mask_ap"),
    (
        Row("random weights", (31.0, 28.5)),
        Row("supervised", (38.9, 35.4)),
        Row("SMoG", (40.1, 36.9)),
    ),
)


def paper_table(
    evaluation: str, backbone: str, width: int, share: float, dataset: str
) -> Table | None:
    """The paper's table for an evaluation of a net, or None where it has none.

    Args:
        evaluation: such as "linear".
        backbone: the recipe's; the tables are of ResNet-50 and Swin-T, others see ResNet-50's.
        width: of a ResNet.
        share: of the labels, for "finetune".
        dataset: "voc" or "cityscapes", for "segmentation".
    """
    if evaluation == "linear":
        if backbone.startswith("swin"):
            return LINEAR_SWIN
        wide = [LINEAR_WIDE[width]] if width in LINEAR_WIDE else []
        return LINEAR_R50._replace(rows=[*LINEAR_R50.rows, *wide])
    if evaluation == "finetune":
        return FINETUNE_1 if share <= 0.01 else FINETUNE_10 if share <= 0.1 else FINETUNE_100
    if evaluation == "segmentation":
        return CITYSCAPES if dataset == "cityscapes" else VOC
    return COCO if evaluation == "detection" else None


def compare(table: Table, name: str, results: dict[str, float]) -> str:
    """The table as text, with our results as its last row."""
    ours = tuple(100 * results[c] if c in results else None for c in table.columns)
    lines = [f"{table.title}, per cent", f"  {'':<32}" + "".join(f"{c:>9}" for c in table.columns)]
    for row in [*table.rows, Row(name, ours)]:
        cells = ["–" if value is None else f"{value:.1f}" for value in row.values]
        lines.append(f"  {row.method:<32}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)
