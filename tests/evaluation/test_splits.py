"""Which images an evaluation takes of a split."""

import numpy as np

from scale_smog.evaluation.splits import random_subset


def test_some_of_a_folder_are_of_all_its_classes():
    labels = np.repeat(np.arange(10), 100)
    ids = random_subset(len(labels), 200)
    assert len(ids) == 200 and (np.diff(ids) > 0).all() and len(set(labels[ids])) == 10
    assert np.array_equal(random_subset(5, 0), np.arange(5))
    assert np.array_equal(random_subset(5, 9), np.arange(5))
