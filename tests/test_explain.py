"""Every setting is explained, in one place, and what is made of that place is current."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from scale_smog.cli.settings import DOCS, PAGE, SCHEMA, explain, list_settings, settings_page
from scale_smog.cli.settings import recipe_schema as made_schema
from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.evaluation.protocols import Protocols
from scale_smog.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SETTINGS = [*list_settings(Recipe), *list_settings(Protocols)]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((DOCS / SCHEMA).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def parsed(path: Path) -> dict:
    from scale_smog.recipe import _parse_yaml

    return _parse_yaml(path.read_text(), path.name)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_is_explained(setting) -> None:
    assert len(setting.meaning) > 10 and setting.meaning.endswith(".")
    shown = explain(setting.key)
    assert shown.startswith(setting.key) and f"default{' ' * 15}{setting.default}" in shown


def test_the_list_has_every_key_of_recipes_and_protocols() -> None:
    keys = {
        f"{section}.{name}"
        for model in (Recipe(run={"steps": 1}, data={"path": "x"}), Protocols())  # pyright: ignore
        for section, values in model.model_dump().items()
        for name in values
    }
    assert {setting.key for setting in SETTINGS} == keys
    assert {line.split()[0] for line in explain("").splitlines()} == keys
    assert {line.split()[0] for line in explain("linear").splitlines()} == {
        key for key in keys if key.startswith("linear.")
    }


def test_a_setting_shows_type_range_default_meaning_and_the_papers_place() -> None:
    assert explain("augment.hue").splitlines() == [
        "augment.hue             Largest change of hue in turns: 0.5 is half the colour circle.",
        "  values                number from 0 to 0.5",
        "  default               0.1",
        "  paper                 SMoG, section 3.4",
    ]
    values = {setting.key: setting.values for setting in SETTINGS}
    assert values["model.batch_norm"] == "global, node, local or integer above 0"
    assert values["data.order"] == "global, block"
    assert values["augment.blur"] == "two of: number from 0 to 1"
    assert values["linear.learning_rates"] == "list of: number above 0"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.ordr", "data.order"),
        ("ordr", "data.order"),
        ("grouping.num_group", "grouping.num_groups"),
        ("linear.epoch", "linear.epochs"),
    ],
)
def test_an_unknown_setting_gets_the_nearest_one(key, nearest) -> None:
    with pytest.raises(UserError, match=f"did you mean '{re.escape(nearest)}'"):
        explain(key)


@pytest.mark.parametrize(
    ("name", "made"), [(PAGE, lambda: settings_page() + "\n"), (SCHEMA, made_schema)]
)
def test_what_is_made_of_the_settings_is_current(name, made) -> None:
    assert (DOCS / name).read_text() == made(), "run `python -m scale_smog.cli.settings`"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_passes_it(path, validator) -> None:
    named = path.read_text().splitlines()[0].partition("$schema=")[2]
    assert (path.parent / named).resolve() == DOCS / SCHEMA
    validator.validate(parsed(path))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "ordr", "block"),
        ("data", "order", "blok"),
        ("data", "global_batch", 0),
        ("data", "global_batch", 2.5),
        ("data", "path", 3),
        ("augment", "blur", [1.0]),
        ("model", "ema", 1.5),
        ("grouping", "kmeans", "yes"),
        ("run", "steps", 100),  # beside run.epochs
        ("optimiser", "name", "lars"),
    ],
)
def test_a_wrong_recipe_is_refused_by_the_schema(section, key, value, validator) -> None:
    recipe = parsed(shipped_recipes()["r50"])
    recipe.setdefault(section, {})[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(recipe)
