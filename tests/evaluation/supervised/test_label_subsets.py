"""Which labels a classifier learns from."""

import numpy as np
import pytest
from images import jpeg

from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.errors import UserError
from scale_smog.evaluation.protocols import FinetuneConfig
from scale_smog.evaluation.supervised.label_subsets import (
    balanced_subset,
    hold_out,
    labelled_samples,
    listed_samples,
)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_share_is_balanced_reproducible_and_of_the_right_size(share):
    labels = np.random.default_rng(0).permutation(np.arange(20_000) % 20)
    ids = balanced_subset(labels, share, seed=3)
    counts = np.bincount(labels[ids], minlength=20)
    assert len(ids) == share * len(labels) and counts.min() == counts.max() == share * 1000
    assert np.array_equal(ids, balanced_subset(labels, share, seed=3))
    assert not np.array_equal(ids, balanced_subset(labels, share, seed=4))
    assert len(np.unique(ids)) == len(ids)


def test_every_class_has_an_image_even_in_a_tiny_share():
    labels = np.repeat(np.arange(50), 3)
    assert np.array_equal(labels[balanced_subset(labels, 0.01, 0)], np.arange(50))


def test_held_out_images_are_not_trained_on():
    labels = np.arange(1000) % 10
    own, kept = hold_out(labels, 0.1, seed=0)
    assert len(kept) == 100 and np.array_equal(np.union1d(own, kept), np.arange(1000))
    assert not np.intersect1d(own, kept).size


@pytest.fixture
def imagenet_like(tmp_path):
    for synset in ("n01440764", "n01443537"):
        (tmp_path / "train" / synset).mkdir(parents=True)
        for number in (10043, 7, 99):
            name = f"{synset}_{number}.JPEG"
            (tmp_path / "train" / synset / name).write_bytes(jpeg(20, 20, number))
    return FolderDataset(tmp_path, "train")


def test_the_published_lists_of_simclr_are_read(tmp_path, imagenet_like):
    listing = tmp_path / "1percent.txt"
    listing.write_text("n01443537_7.JPEG\nn01440764_10043.JPEG\n")
    config = FinetuneConfig(list=str(listing), share=1 / 3)
    with pytest.raises(UserError, match=r"names 0\.33 of the images.* give finetune\.share=0\.33"):
        labelled_samples(FinetuneConfig(list=str(listing)), imagenet_like)
    ids = labelled_samples(config, imagenet_like)
    names = sorted(imagenet_like.names[i].rpartition("/")[2] for i in ids)
    assert names == ["n01440764_10043.JPEG", "n01443537_7.JPEG"]
    assert imagenet_like.labels[ids].tolist() == [0, 1]


def test_a_list_of_other_images_is_refused_by_name(tmp_path, imagenet_like):
    listing = tmp_path / "list.txt"
    listing.write_text("n01443537_7.JPEG\nn09999999_1.JPEG\n")
    with pytest.raises(UserError, match=r"1 of 2 names .* n09999999_1\.JPEG"):
        listed_samples(imagenet_like, str(listing))
    with pytest.raises(UserError, match="cannot read"):
        listed_samples(imagenet_like, str(tmp_path / "none.txt"))
