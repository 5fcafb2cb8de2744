"""What classifiers are trained on."""

import numpy as np
import pytest

from scale_smog.data.plan import NEVER
from scale_smog.evaluation.supervised.crops import SubsetPlan


def test_a_plan_of_a_subset_visits_it_and_nothing_else():
    ids = np.array([3, 5, 8, 13, 21, 34])
    plan = SubsetPlan(ids, batch=2, seed=0)
    epoch = np.concatenate([plan.ids(step) for step in range(3)])
    assert sorted(epoch) == ids.tolist()
    halves = [plan.ids(1, rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves), plan.ids(1))


@pytest.mark.parametrize("step", [0, 2, 7])
def test_the_next_read_of_each_image_of_a_subset_is_known_by_its_own_id(step):
    ids, world_size = np.array([3, 5, 8, 13, 21, 34, 35]), 3
    plan = SubsetPlan(ids, batch=6, seed=1)
    end = (step * 6 // 7 + 2) * 7  # of the next epoch, as a place in the stream of images
    expected = np.full(36, NEVER)
    for later in reversed(range(step, end // 6 + 1)):
        for rank in (1, 2):
            places = later * 6 + rank * 2 + np.arange(2)
            expected[plan.ids(later, rank, world_size)[places < end]] = later
    assert (expected != NEVER).sum() > 2
    assert np.array_equal(plan.next_steps(step, range(1, 3), world_size), expected)
