"""The paper's results: every number as printed, and only beside results of the same images."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from scale_smog.evaluation.paper import ImageCounts, Ours, compare, load_tables

PRINTED = Path(__file__).with_name("paper_tables.md").read_text()
IMAGENET = ImageCounts(num_classes=1000, num_train=1_281_167, num_test=50_000)
OURS = Ours(
    evaluation="linear",
    backbone="resnet50",
    width=1,
    epochs=400.0,
    batch=4096,
    num_small_crops=4,
    start="",
    share=0.01,
    dataset="voc",
    images=IMAGENET,
    results={"top1": 0.7612, "top5": 0.93},
)


def printed_rows(number: int) -> list[list[str]]:
    part = re.split(r"^## ", PRINTED, flags=re.MULTILINE)[number]
    assert part.startswith(f"Table {number}:")
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def as_stored(cell: str) -> str | float | None:
    return None if cell == "–" else float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else cell


@pytest.mark.parametrize("number", range(1, 7))
def test_a_table_has_every_row_and_number_of_the_paper(number) -> None:
    table = load_tables()[number - 1]
    assert table.source == f"SMoG, Table {number}"
    expected = []
    for model, *cells in printed_rows(number):
        choices = cells[-1].split(" / ")  # two trainings of the supervised net
        for place, last in enumerate(choices):
            plain = len(choices) == 2 and place == 0
            values = [*cells[:-1], last.removesuffix(" without Mixup")]
            expected.append([model + ", without Mixup" * plain, *values])
    assert [list(row) for row in table.rows] == [list(map(as_stored, row)) for row in expected]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_ablations_have_every_number_of_the_paper() -> None:
    part = PRINTED.partition("## Table 7")[2].partition("## Figure")[0]
    expected = [
        float(re.search(r"(\d+\.\d)( \(.*\))?$", entry.strip()).group(1))
        for line in part.splitlines()[1:]
        for entry in line.split("·")
        if entry.strip()
    ]
    assert [row[-1] for row in load_tables()[6].rows] == expected and len(expected) == 16


def test_our_result_is_the_last_row() -> None:
    text = compare(OURS)
    assert text.startswith("linear, ImageNet-1k, ResNet-50, per cent (SMoG, Table 1)")
    lines = text.splitlines()
    assert lines[-2].split() == ["ours", "†", "400", "4096", "76.1", "93.0"]
    assert lines[-3].split() == ["SMoG", "†", "400", "4096", "76.4", "93.1"]
    assert "Table 7" not in text and "Table 3" not in text


@pytest.mark.parametrize(
    ("changes", "sources", "row"),
    [
        ({"width": 4}, ["3"], "ours † x4 – 76.1 93.0"),
        ({"backbone": "swin_tiny"}, ["2"], "ours † swin_tiny – – 76.1"),
        ({"epochs": 100.0, "num_small_crops": 0}, ["1", "7"], "ours 76.1"),
        ({"evaluation": "finetune", "share": 0.1}, ["4"], "ours † x1 – 76.1 – – 93.0 –"),
    ],
)
def test_the_tables_are_those_of_the_net_and_the_protocol(changes, sources, row) -> None:
    text = compare(replace(OURS, **changes))
    assert re.findall(r"SMoG, Table (\d)\)", text) == sources
    last = [line for line in text.splitlines() if line.startswith("ours")][-1]
    assert " ".join(last.split()) == row


def test_dense_tasks_have_all_their_columns() -> None:
    images = ImageCounts(num_classes=19, num_train=2975, num_test=500)
    results = {"miou": 0.7603, "macc": 0.8397}
    ours = replace(OURS, evaluation="segmentation", dataset="cityscapes", images=images)
    assert compare(replace(ours, results=results)).splitlines()[-1].split() == [
        *("ours", "†", "76.03", "83.97", "–", "–")
    ]
    names = ("ap", "ap50", "ap75")
    results = {f"{kind}_{name}": 0.4 for kind in ("box", "mask") for name in names}
    images = ImageCounts(num_classes=80, num_train=118_287, num_test=5000)
    ours = replace(OURS, evaluation="detection", images=images, results=results)
    assert compare(ours).splitlines()[-1].split() == ["ours", "†", *["40.0"] * 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": ImageCounts(10, 8000, 2000)}, "rows are of ImageNet-1k (1,000 classes"),
        ({"images": replace(IMAGENET, num_train=128_116)}, "128,116 training"),
        ({"backbone": "resnet18"}, "the paper has no linear results of resnet18"),
        ({"backbone": "resnet50d"}, "the paper has no linear results of resnet50d"),
        ({"evaluation": "knn"}, "the paper has no knn results"),
        ({"evaluation": "finetune", "share": 0.05}, "with 5 % of the labels"),
        ({"evaluation": "finetune", "width": 4}, "results of resnet50 x4"),
        ({"evaluation": "segmentation"}, "VOC 2012"),
    ],
)
def test_other_images_and_nets_get_one_line_that_says_why(changes, words) -> None:
    text = compare(replace(OURS, **changes))
    assert text.startswith("no comparison: ") and words in text and "\n" not in text


def test_a_few_images_put_aside_leave_it_the_same_dataset() -> None:
    images = replace(IMAGENET, num_train=1_281_140)
    assert compare(replace(OURS, images=images)).startswith("linear")
