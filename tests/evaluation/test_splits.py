"""Which images an evaluation takes of a dataset and of a split."""

from pathlib import Path

import numpy as np
import pytest
from field_sets import samples, write_tar
from images import jpeg

from scale_smog.data.prepare.index import index_folder
from scale_smog.errors import UserError
from scale_smog.evaluation import splits


def test_some_of_a_folder_are_of_all_its_classes():
    labels = np.repeat(np.arange(10), 100)
    ids = splits.random_subset(len(labels), 200)
    assert len(ids) == 200 and (np.diff(ids) > 0).all() and len(set(labels[ids])) == 10
    assert np.array_equal(splits.random_subset(5, 0), np.arange(5))
    assert np.array_equal(splits.random_subset(5, 9), np.arange(5))


def folders(folder: Path, *unlabelled: str) -> Path:
    """`train`, `val` and `test` with two classes each, or flat."""
    for split in ("train", "val", "test"):
        for name in ("",) if split in unlabelled else ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.jpg").write_bytes(jpeg(20, 20, 0))
    return folder


def tars(folder: Path, *unlabelled: str) -> Path:
    """Tars of others for these splits, with two images each; of the unlabelled, one has a label."""
    for split in ("train", "val", "test"):
        members = samples("01")
        if split in unlabelled:
            del members["0001.cls"]
        write_tar(folder / f"{split}-0.tar", members)
    for split in ("train", "val", "test"):
        index_folder(folder, split)
    return folder


@pytest.mark.parametrize("make", [folders, tars])
@pytest.mark.parametrize(
    ("unlabelled", "chosen"), [((), "test"), (("val",), "test"), (("test",), "val")]
)
def test_the_test_split_is_the_first_whose_images_are_all_labelled(
    tmp_path, make, unlabelled, chosen
):
    path = str(make(tmp_path, *unlabelled))
    assert list(splits.named_splits(path, "kNN")) == ["train", chosen]
    assert [x.num_samples for x in splits.named_splits(path, "kNN").values()] == [2, 2]


def test_splits_without_labels_are_named(tmp_path):
    path = str(folders(tmp_path, "val", "test"))
    with pytest.raises(UserError, match=r"kNN needs labels, .* without one in test and in val$"):
        splits.named_splits(path, "kNN")
