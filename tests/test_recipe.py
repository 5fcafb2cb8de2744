"""The configuration: strict, with one clear line for every mistake."""

from pathlib import Path

import pytest

from scale_smog import UserError, load_recipe
from scale_smog.recipe import dump_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
MINIMAL = "run: {steps: 10}\ndata: {path: somewhere}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_says_what_to_expect(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.dir == f"runs/{path.stem}"
    header = path.read_text().split("\nrun:")[0]
    assert header.startswith("#") and "xpected" in header


def test_a_mistyped_section_is_named_before_what_it_leaves_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rnu: {steps: 3}\ndata: {path: x, global_batch: 4}\n")
    with pytest.raises(UserError, match="unknown key 'rnu': did you mean 'run'"):
        load_recipe(path)


def test_defaults_are_the_papers_resnet50(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert (recipe.model.backbone, recipe.model.dim, recipe.model.ema) == ("resnet50", 128, 0.999)
    assert (recipe.grouping.num_groups, recipe.grouping.reset_every) == (3000, 300)
    assert (recipe.grouping.beta_start, recipe.grouping.beta_end) == (1.0, 0.99)
    assert recipe.grouping.temperature == 0.1
    assert (recipe.optimizer.name, recipe.optimizer.base_lr) == ("lars", 0.3)
    assert (recipe.optimizer.lr_batch, recipe.optimizer.weight_decay) == (256, 1e-6)
    assert recipe.optimizer.warmup_epochs == 10


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "grouping.num_group=3",
            "unknown key 'grouping.num_group': did you mean 'grouping.num_groups'",
        ),
        ("data.num_groups=3", "did you mean 'grouping.num_groups'"),
        ("gruping.num_groups=3", "unknown key 'gruping': did you mean 'grouping'"),
        ("grouping.num_groups=many", "key 'grouping.num_groups'"),
        ("grouping.num_groups=1", "greater than or equal to 2"),
        ("grouping.kmeans=1", "key 'grouping.kmeans'"),
        ("model.ema=1.5", "key 'model.ema'"),
        ("engine.kind=fsdp9", "key 'engine.kind'"),
        ("model.batch_norm=world", "key 'model.batch_norm'"),
        ("steps=3", "section.key=value"),
        ("run.seed", "section.key=value"),
    ],
)
def test_a_wrong_override_is_named_in_one_line(minimal: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(minimal, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: 10, steps: 20}\ndata: {path: x}\n", "'steps' appears twice"),
        ("run: {steps: 10, epochs: 2}\ndata: {path: x}\n", "exactly one of run.steps"),
        ("run: {}\ndata: {path: x}\n", "exactly one of run.steps"),
        ("run: {steps: 10}\n", "'data' is missing"),
        ("run: {steps: 10}\ndata: {}\n", "'data.path' is missing"),
        ("- a\n", "mapping of sections"),
        ("run: {steps: 10\n", "not plain YAML"),
        ("run: !!python/object/apply:os.system ['touch canary']\n", "not plain YAML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        load_recipe(path)
    assert not Path("canary").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_recipe_of_nearly_that_name_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'r50x4'"):
        load_recipe("r50x5")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "wrong.yaml")


def test_an_override_of_one_length_replaces_the_other(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["run.epochs=2"])
    assert recipe.run.epochs == 2 and recipe.run.steps is None


def test_scientific_notation_is_a_number(minimal: Path) -> None:
    assert load_recipe(minimal, ["optimizer.weight_decay=1e-3"]).optimizer.weight_decay == 1e-3


def test_more_groups_than_features_is_refused_with_the_limit(minimal: Path) -> None:
    overrides = ["data.global_batch=8", "grouping.bank_steps=10", "grouping.num_groups=81"]
    with pytest.raises(UserError, match="80 features"):
        load_recipe(minimal, overrides)
    overrides += ["grouping.kmeans=false", "grouping.init=random"]
    assert load_recipe(minimal, overrides).grouping.num_groups == 81


@pytest.mark.parametrize(
    "loader", [["data.loader=synthetic"], ["data.loader=stream", "data.stream=x"]]
)
def test_labels_that_are_not_the_datasets_teach_no_classifier(minimal: Path, loader) -> None:
    with pytest.raises(UserError, match=r"learns from the dataset's labels"):
        load_recipe(minimal, ["evaluation.online=true", *loader])


def test_a_dumped_recipe_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    texts = ["run.dir=3e-4", "data.path=1e3", "data.cache_dir=010"]
    recipe = load_recipe(minimal, ["model.batch_norm=8", "augment.blur=[0.5, 0.1]", *texts])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "ablations").glob("7*.yaml")), ids=lambda path: path.stem
)
def test_an_ablation_changes_the_groups_alone(path: Path) -> None:
    baseline = load_recipe(RECIPES / "ablations" / "baseline.yaml").model_dump()
    ablation = load_recipe(path).model_dump()
    ablation["run"]["dir"] = baseline["run"]["dir"]
    changed = {section for section in baseline if baseline[section] != ablation[section]}
    assert changed == {"grouping"}
