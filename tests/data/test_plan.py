"""Who sees which sample when."""

import numpy as np
import pytest

from scale_smog.data.plan import NEVER, EpochPlan, SequentialPlan
from scale_smog.errors import UserError


@pytest.mark.parametrize("num_samples", [64, 61, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block", [False, True])
def test_every_sample_comes_exactly_once_an_epoch_at_any_world_size(num_samples, world_size, block):
    sizes = [5, num_samples - 6, 1] if block else None  # ragged shards
    plan = EpochPlan(num_samples, 24, seed=5, shard_sizes=sizes, block_shards=2)
    num_epochs = 24  # N * 24 samples fill N whole steps
    stream = [
        sample
        for step in range(num_samples)
        for rank in range(world_size)
        for sample in plan.ids(step, rank, world_size)
    ]
    epochs = np.array(stream).reshape(num_epochs, num_samples)
    assert (np.sort(epochs, axis=1) == np.arange(num_samples)).all()


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_share_the_global_batch_in_order(world_size):
    plan = EpochPlan(1000, global_batch=24, seed=5)
    whole = plan.ids(50)
    parts = [plan.ids(50, rank, world_size) for rank in range(world_size)]
    assert (np.concatenate(parts) == whole).all()
    assert {len(part) for part in parts} == {24 // world_size}


def test_each_epoch_and_each_seed_has_its_own_order():
    plan = EpochPlan(1000, global_batch=1000, seed=5)
    assert (plan.ids(0) != plan.ids(1)).mean() > 0.9
    assert (plan.ids(0) != EpochPlan(1000, 1000, seed=6).ids(0)).mean() > 0.9


def test_the_block_order_mixes_within_a_few_shards_and_differs_each_epoch():
    sizes = [100] * 10
    plan = EpochPlan(1000, 1000, seed=5, shard_sizes=sizes, block_shards=2)
    for step in range(2):
        blocks = (plan.ids(step) // 100).reshape(5, 200)  # shards, in the order of the epoch
        assert [len(set(block)) for block in blocks] == [2] * 5
        assert all(90 > np.count_nonzero(block[:100] == block[0]) > 10 for block in blocks)
    assert (plan.ids(0) // 100 != plan.ids(1) // 100).mean() > 0.5


def test_shards_that_do_not_hold_the_samples_are_refused():
    with pytest.raises(UserError, match="100 samples, but the shards have 99"):
        EpochPlan(100, 10, shard_sizes=[50, 49])


def test_the_step_is_the_only_state():
    fresh, used = EpochPlan(50, 8, seed=1), EpochPlan(50, 8, seed=1)
    for step in range(40):
        used.ids(step)
    assert (fresh.ids(33) == used.ids(33)).all()
    assert fresh.ids(33).dtype == np.int64


def test_a_batch_across_two_epochs_knows_both():
    plan = EpochPlan(10, 4, seed=1)
    assert plan.epochs(2).tolist() == [0, 0, 1, 1]


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_next_that_they_do():
    with pytest.raises(UserError, match="take 12"):
        EpochPlan(100, 10).ids(0, rank=0, world_size=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_visits_every_sample_once_before_it_repeats_the_last(world_size):
    ids = np.arange(100, 123)
    plan = SequentialPlan(ids, batch=4)
    seen = [
        i
        for step in range(plan.num_steps(world_size))
        for rank in range(world_size)
        for i in plan.ids(step, rank, world_size)
    ]
    assert seen[:23] == ids.tolist() and set(seen[23:]) <= {122}


@pytest.mark.parametrize("sizes", [None, (7, 10, 6)])
def test_the_next_read_of_each_sample_is_known(sizes):
    plan, world_size = EpochPlan(23, 6, 5, sizes, block_shards=2), 3
    for step in (0, 3, 11):
        expected = np.full(23, NEVER)
        end = (step * 6 // 23 + 2) * 23  # of the next epoch
        for later in reversed(range(step, end // 6 + 1)):
            for rank in (1, 2):
                ids = plan.ids(later, rank, world_size)
                expected[ids[plan._positions(later, rank, world_size) < end]] = later
        assert (plan.next_steps(step, range(1, 3), world_size) == expected).all()


def test_the_next_read_in_an_evaluation_is_known():
    plan = SequentialPlan(np.array([5, 2, 9, 4, 0]), 2)
    steps = plan.next_steps(1, range(1), 1)
    assert steps.tolist() == [2, NEVER, NEVER, NEVER, 1, NEVER, NEVER, NEVER, NEVER, 1]
