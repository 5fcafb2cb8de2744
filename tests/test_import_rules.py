"""Data flows one way: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scale_smog"
# Anything may import these.
LEAVES = {"errors", "config", "distributed", "counter_rng", "phases", "retries"}
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "counter_rng": set(),
    "retries": set(),
    "meeting": {"errors"},
    "distributed": {"errors", "meeting"},
    "recipe": {"config", "errors"},
    "schedules": {"config"},
    "loss": {"distributed"},
    "small_data": {"config", "recipe"},
    "optim": {"config", "distributed"},
    "metrics": {"distributed"},
    "phases": set(),
    "preemption": {"distributed", "phases"},
    "rank_logs": {"distributed", "errors", "phases"},
    "deadlines": {"config", "distributed", "phases", "rank_logs"},
    "health": {"config", "distributed", "data", "errors"},
    "checkpoint": LEAVES,
    "data": LEAVES,
    "models": LEAVES,
    "grouping": LEAVES,
    "engine": LEAVES | {"models", "optim"},
    "evaluation": LEAVES | {"data", "models", "grouping", "checkpoint", "recipe", "run_folder"},
    "profiling": LEAVES | {"models"},
}


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


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_lies_before_it(part):
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for path in files:
        beyond = own_parts(path) - MAY_IMPORT[part] - {part}
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("deepspeed", {"engine/zero.py"}),
        ("nvidia", {"data/dali.py", "data/dali_fast.py"}),
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
