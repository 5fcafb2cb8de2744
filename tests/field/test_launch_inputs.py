"""Recipes, command lines and environments as users have them: each kind, and what comes of it."""

from pathlib import Path

import pytest

from scale_smog import UserError, load_recipe
from scale_smog.evaluation.protocols import load_protocols

MINIMAL = "run: {steps: 10}\ndata: {path: somewhere}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The one line that a recipe and its overrides are refused with."""
    path = folder / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# Text that YAML takes for something else.
TEXTS = ["no", "off", "0", "~", "null", "2012", "2024-06-01", "010", "1:30", "runs/a #1", "a: b"]
TEXTS += ["[x", "!x", "*x", "&x", "'x'", "@x", "1e3", ".inf", "true", "x, y", "%x", "- x"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_that_holds_text_takes_an_overrides_text_as_it_stands(recipe, text):
    assert load_recipe(recipe, [f"run.dir={text}"]).run.dir == text
    assert load_recipe(recipe, [f"data.path={text}"]).data.path == text
    assert load_protocols([f"features.out={text}"]).features.out == text


def test_a_choice_of_words_quotes_the_word_that_was_given(tmp_path):
    assert "not 'off'" in refusal(tmp_path, MINIMAL, "data.device=off")


def test_a_key_that_holds_a_number_or_a_word_reads_yaml(recipe):
    assert load_recipe(recipe, ["model.batch_norm=8"]).model.batch_norm == 8
    assert load_recipe(recipe, ["model.batch_norm=node"]).model.batch_norm == "node"


@pytest.mark.parametrize("text", ["2024-06-01", "2024-13-45", "010", "1:30", "1.0.1"])
def test_what_only_old_yaml_takes_for_a_date_or_a_number_is_text(tmp_path, text):
    path = tmp_path / "dated.yaml"
    path.write_text(MINIMAL.replace("somewhere", text))
    assert load_recipe(path).data.path == text
    assert f"not '{text}'" in refusal(tmp_path, MINIMAL, f"grouping.num_groups={text}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: c\n", "line 1: a key is a word, not a list or a mapping"),
        ("run: {? {steps: 3} : 4}\n", "line 1: a key is a word"),
        ("run.steps: 10\ndata: {path: x}\n", "write 'run.steps' as 'run: {steps: ...}'"),
        ("[" * 5000, "is not plain YAML"),
        (f"run: {{steps: {'9' * 5000}}}\n", "is not plain YAML"),
        ("run: {steps: !!int many}\n", "is not plain YAML"),
        ("run: {steps: !!timestamp now}\n", "is not plain YAML"),
        (MINIMAL + "---\n" + MINIMAL, "is not plain YAML"),
        ("run:\n\tsteps: 3\n", "is not plain YAML"),
        ("", "a recipe is a mapping of sections"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "override", ["run.epochs=.inf", "optimizer.base_lr=.inf", "model.ema=.nan"]
)
def test_a_number_without_an_end_is_refused(tmp_path, override):
    assert "finite number" in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("key", ["run.seed", "run.steps", "data.global_batch"])
def test_a_number_beyond_64_bits_is_refused(tmp_path, key):
    assert f"key '{key}'" in refusal(tmp_path, MINIMAL, f"{key}={2**63}")


def test_a_mapping_within_a_mapping_is_given_whole(tmp_path):
    said = refusal(tmp_path, MINIMAL, "engine.deepspeed.zero_optimization.reduce_scatter=true")
    whole = "engine.deepspeed={zero_optimization: {reduce_scatter: true}}"
    assert f"'{whole}'" in said
    path = tmp_path / "mapping.yaml"
    path.write_text(MINIMAL)
    assert load_recipe(path, [whole, "engine.kind=zero1"]).engine.deepspeed
