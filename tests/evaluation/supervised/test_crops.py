"""What classifiers are trained on."""

import numpy as np

from scale_smog.evaluation.supervised.crops import SubsetPlan


def test_a_plan_of_a_subset_visits_it_and_nothing_else():
    ids = np.array([3, 5, 8, 13, 21, 34])
    plan = SubsetPlan(ids, batch=2, seed=0)
    epoch = np.concatenate([plan.ids(step) for step in range(3)])
    assert sorted(epoch) == ids.tolist()
    halves = [plan.ids(1, rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves), plan.ids(1))
