"""What is DDP's own."""

import warnings
from pathlib import Path

import engine_runs as runs
from ranks import run_on_ranks


def warnings_of_a_step(folder: Path) -> list[str]:
    recipe = runs.recipe_of(folder, kind="ddp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs.run(recipe, runs.build_state(recipe), num_steps=1)
    return [str(warning.message) for warning in caught]


def test_gradients_of_1x1_convolutions_are_laid_out_as_the_buckets(tmp_path):
    for said in run_on_ranks(2, warnings_of_a_step, tmp_path):
        assert not [text for text in said if "strides" in text]
