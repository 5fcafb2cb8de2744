"""Data flows one way: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scale_smog"
# A part imports parts of floors above its own only.
FLOORS = [
    {"errors", "config", "counter_rng"},
    {"distributed", "recipe", "schedules"},
    {"runtime", "loss", "optim", "small_data"},
    {"data", "models", "grouping"},
    {"engine", "checkpoint", "profiling"},
    {"methods"},
    {"reporting", "state"},
    {"evaluation", "preflight"},
    {"loop", "export", "report"},
    {"pretrain", "throughput"},
    {"rehearsal"},
]
# These get their own section of the recipe and know neither one another nor the recipe's file.
WINGS = {"data", "models", "grouping", "engine", "checkpoint", "profiling"}
PROGRAMS_ONLY = {"recipe", "schedules", "small_data"}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_parts(path: Path) -> set[str]:
    """Which parts of scale_smog a file imports, by their first name."""
    names = {name for name in imports(path) if name.startswith("scale_smog.")}
    parts = {name.split(".")[1] for name in names}
    return {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").exists()}


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    return files


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_part_imports_only_what_lies_above_it(floor):
    above = set().union(*FLOORS[:floor])
    for part in FLOORS[floor]:
        for path in files_of(part):
            beyond = own_parts(path) - above - {part}
            assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_every_part_has_its_floor():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    others = {"__init__", "__main__", "__pycache__", "cli", "recipes"}
    assert modules - others == set().union(*FLOORS)


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_sees_no_whole_recipe_file(wing):
    for path in files_of(wing):
        assert not own_parts(path) & PROGRAMS_ONLY, path


@pytest.mark.parametrize("part", ["data", "models", "grouping"])
def test_data_models_and_groups_do_not_know_one_another(part):
    for path in files_of(part):
        assert not own_parts(path) & ({"data", "models", "grouping"} - {part}), path


def test_training_does_not_know_the_tools_that_prepare_its_data():
    for path in PACKAGE.rglob("*.py"):
        if "prepare" not in path.parts and "cli" not in path.parts:
            assert not any("scale_smog.data.prepare" in name for name in imports(path)), path


def test_no_folder_has_more_modules_than_one_can_look_over():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= 14, folder


def test_no_function_is_longer_than_a_screen():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("deepspeed", {"engine/zero.py"}),
        ("nvidia", {"data/loaders/dali.py", "data/loaders/dali_fast.py"}),
        ("timm", {"models/timm_nets.py"}),
    ],
)
def test_a_heavy_library_has_one_importer(library, owners):
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert importers == owners


def test_nothing_but_its_own_file_and_the_settings_names_a_method():
    from scale_smog.methods import METHODS

    names = METHODS.keys() - {"smog"}  # which is the program's name too
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] in ("methods", "config.py") or path.name == "protocols.py":
            continue  # the latter has protocols of evaluation, one of them SimCLR's
        words = {
            node.value for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }  # fmt: skip
        assert not words & names, path
        assert not any(name.startswith("scale_smog.methods.") and
                       name.split(".")[2] in METHODS for name in imports(path)), path  # fmt: skip


def test_a_method_is_one_file_that_can_be_read_at_once():
    from scale_smog.methods import METHODS

    for name in METHODS:
        lines = (PACKAGE / "methods" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 125, name


def test_the_package_does_not_import_its_programs():
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"launcher", "data_tools"}


def test_no_program_hides_a_standard_module():
    programs = [*(ROOT / "launcher").glob("*.py"), *(ROOT / "data_tools").glob("*.py")]
    assert programs and not {path.stem for path in programs} & sys.stdlib_module_names


def test_no_file_names_a_path_of_one_machine_or_a_plan_of_work():
    words = ["/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "sha" + "red/design"]
    for suffix in ("*.py", "*.yaml", "*.md", "Makefile", "*.toml"):
        for path in ROOT.rglob(suffix):
            if not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts):
                text = path.read_text(errors="ignore")
                assert not [w for w in words if w in text], path


def test_parts_are_there_after_a_plain_import_of_the_package():
    import scale_smog

    assert scale_smog.models.build_backbone("resnet_tiny").num_features == 128
    assert scale_smog.data.EpochPlan(10, 2).ids(0).shape == (2,)
    with pytest.raises(AttributeError, match="nothing"):
        _ = scale_smog.nothing
