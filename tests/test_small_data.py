"""What a recipe for a small set leaves open is derived from its size, and said."""

import pytest
from small_recipe import small_recipe

from scale_smog import UserError, load_recipe
from scale_smog.config import Recipe
from scale_smog.pretrain import pretrain
from scale_smog.small_data import fit_to_data


def recipe_of(**sections):
    base = {"run": {"steps": 600, "small_data": True}, "data": {"path": "", "global_batch": 256}}
    return Recipe.model_validate(base | sections)


def test_cifar10_in_600_steps_gets_the_measured_settings():
    recipe, lines = fit_to_data(recipe_of(), 50_000)
    grouping = recipe.grouping
    assert (grouping.num_groups, grouping.bank_steps, grouping.reset_every) == (2000, 20, 20)
    model = recipe.model
    assert (model.ema, model.head_width, model.identity_predictor) == (0.9, 2048, True)
    assert recipe.optimizer.name == "adamw"
    assert recipe.optimizer.base_lr == 2e-3 and recipe.optimizer.lr_batch == 256
    assert recipe.optimizer.warmup_epochs * 50_000 / 256 == pytest.approx(30, abs=0.1)
    assert "small data: grouping.num_groups=2000 (50000 images)" in lines
    assert any(line.startswith("small data: model.head_width=2048 ") for line in lines)


def test_what_the_recipe_gives_stays_and_the_rest_follows_from_it():
    recipe, lines = fit_to_data(recipe_of(grouping={"num_groups": 400}), 50_000)
    assert recipe.grouping.num_groups == 400 and recipe.grouping.bank_steps == 4
    assert not any("num_groups" in line for line in lines)


def test_a_short_run_is_evaluated_and_saved_ten_times():
    run = fit_to_data(recipe_of(run={"steps": 585, "small_data": True}), 3000)[0].run
    assert run.evaluate_every == run.checkpoint_every == 58


def test_a_long_run_is_saved_no_less_often_than_without():
    long = {"epochs": 200.0, "small_data": True}
    for own in ({}, {"keep_checkpoint_every": 5000}):
        run = fit_to_data(recipe_of(run=long | own), 200_000)[0].run
        assert run.evaluate_every == 15_625 and run.checkpoint_every == 1000
    short = long | {"epochs": 1.0, "keep_checkpoint_every": 500}
    assert fit_to_data(recipe_of(run=short), 200_000)[0].run.checkpoint_every == 1000
    assert fit_to_data(recipe_of(run=long | {"stop_below": {"knn": 0.2}}), 200_000)


def test_a_long_run_has_a_slow_momentum_net_and_the_papers_number_of_groups():
    recipe, _ = fit_to_data(recipe_of(run={"epochs": 100.0, "small_data": True}), 200_000)
    assert recipe.model.ema == 0.99 and recipe.grouping.num_groups == 3000


@pytest.mark.parametrize("num_images", [60, 1000, 50_000, 1_281_167])
@pytest.mark.parametrize("steps", [1, 40, 600, 20_000])
def test_every_size_gives_settings_that_can_be_trained(num_images, steps):
    recipe, _ = fit_to_data(recipe_of(run={"steps": steps, "small_data": True}), num_images)
    assert recipe.bank_steps * 256 >= recipe.grouping.num_groups
    assert recipe.grouping.reset_every <= max(1, steps // 15)


def test_settings_are_judged_with_what_is_derived_not_with_the_defaults():
    few = {"path": "", "global_batch": 8}  # a bank of 300 steps has no 3,000 features
    assert fit_to_data(recipe_of(data=few), 1000)[0].grouping.num_groups == 40
    with pytest.raises(UserError, match=r"model\.head_width of at least 256"):
        fit_to_data(recipe_of(model={"head_width": 200}), 50_000)
    short = recipe_of(grouping={"instance_warmup_steps": 2})
    with pytest.raises(UserError, match=r"2000 groups that are made of them: take at least 8"):
        fit_to_data(short, 50_000)


def test_a_run_that_is_made_longer_keeps_what_it_derived(tmp_path, tars):
    keys = ("run.small_data=true", "model.dim=8")
    pretrain(small_recipe(tmp_path, tars, *keys, "run.steps=2"))
    kept = load_recipe(tmp_path / "run" / "recipe.yaml")
    pretrain(small_recipe(tmp_path, tars, *keys, "run.steps=4"))  # would derive another warm-up
    longer = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert longer.run.steps == 4
    assert longer.model_copy(update={"run": kept.run}) == kept


def test_without_small_data_nothing_changes_but_the_number_of_images():
    recipe = recipe_of(run={"steps": 600})
    fitted, lines = fit_to_data(recipe, 50_000)
    assert fitted.data.num_images == 50_000 and not lines
    assert fitted.model_copy(update={"data": recipe.data}) == recipe


def test_more_groups_than_images_are_doubted_and_nothing_else():
    plain = recipe_of(run={"steps": 600})
    assert fit_to_data(plain, 3000)[1] == []
    [line] = fit_to_data(plain, 2999)[1]
    assert line.startswith("warning: grouping.num_groups=3000 for 2999 images")


def test_a_run_says_what_it_derived_and_keeps_it(tmp_path, tars, capsys):
    pretrain(small_recipe(tmp_path, tars, "run.small_data=true", "run.steps=2", "model.dim=8"))
    assert "small data: grouping.bank_steps=3 (2.5 features a group)" in capsys.readouterr().out
    kept = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert kept.grouping.bank_steps == 3 and kept.model.identity_predictor
    assert kept.grouping.num_groups == 10  # the recipe's own
