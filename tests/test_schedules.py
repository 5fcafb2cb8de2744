"""Rates as functions of the step."""

import itertools

import pytest

from scale_smog.config import GroupingConfig, OptimizerConfig
from scale_smog.schedules import Schedules, due


def make(num_steps=100, warmup_epochs=2.0, steps_per_epoch=5.0):
    optimizer = OptimizerConfig(warmup_epochs=warmup_epochs)
    return Schedules(optimizer, GroupingConfig(), 4096, num_steps, steps_per_epoch)


def test_the_papers_peak_rate_is_4_8_at_batch_4096():
    assert make().peak_lr == pytest.approx(4.8)


def test_the_rate_rises_linearly_then_falls_as_a_cosine_to_zero():
    rates = [make().at(step).lr for step in range(100)]
    assert rates[0] == pytest.approx(0.48) and rates[9] == rates[10] == pytest.approx(4.8)
    assert rates[55] == pytest.approx(2.4)
    assert rates[99] < 0.01
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_beta_is_linear_from_first_to_last_step():
    schedules = make()
    assert schedules.at(0).beta == 1.0
    assert schedules.at(99).beta == pytest.approx(0.99)
    assert schedules.at(33).beta == pytest.approx(1 - 0.01 / 3)


def test_epochs_are_counted_in_samples():
    assert make().at(4).epoch == 1.0


def test_a_run_that_is_all_warm_up_says_so():
    assert make().remarks() == []
    (line,) = make(num_steps=10).remarks()
    assert "all 10 steps are warm-up" in line


def test_nothing_is_due_every_0_steps():
    assert not due(0, 0) and not due(7, 0)
    assert due(300, 300) and not due(301, 300)
