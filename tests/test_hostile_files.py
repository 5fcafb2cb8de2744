"""Nothing from outside runs code: poisoned checkpoints, weights and recipes (tars: tests/data)."""

import ast
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scale_smog import UserError, checkpoint, load_recipe
from scale_smog.checkpoint import Checkpoints
from scale_smog.checkpoint.manifest import (
    FileFacts,
    TensorFacts,
    read_manifest,
    write_manifest,
)
from scale_smog.config import RunConfig
from scale_smog.distributed import Partition
from scale_smog.models.weights import read_weights

ROOT = Path(__file__).parent.parent


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def song(canary) -> bytes:
    """A pickle that runs code; that it can is shown first."""
    content = pickle.dumps(Canary(canary))
    pickle.loads(content)
    assert canary.exists()
    canary.unlink()
    return content


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a checkpoint, beside an older one."""
    run = RunConfig(dir=str(tmp_path / "run"), steps=1)
    checkpoints = Checkpoints(run, {})
    for step in (1, 2):
        checkpoints.save(step, {"online.w": Partition.replicated(torch.full((5,), float(step)))})
        assert checkpoints.wait() is None
    return checkpoint.list_checkpoints(tmp_path / "run")[-1]


def load_newest(folder: Path) -> int:
    run = RunConfig(dir=str(folder.parent.parent), steps=1)
    restored = Checkpoints(run, {}).load_newest({"online.w": Partition.replicated(torch.zeros(5))})
    assert restored
    assert restored.values["online.w"].tolist() == [float(restored.step)] * 5
    return restored.step


def seal_anew(folder: Path, **changes: object) -> None:
    """As an attacker who may write the folder would: hashes are no signature."""
    old = read_manifest(folder)
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    files = {name: FileFacts.of(folder / name) for name in names}
    write_manifest(folder, old._replace(files=files)._replace(**changes))


def poison_metadata(folder: Path, song: bytes) -> int:
    (folder / ".metadata").write_bytes(song)
    return 2  # it is nobody's file: nothing opens it


def poison_and_name_metadata(folder: Path, song: bytes) -> int:
    (folder / ".metadata").write_bytes(song)
    seal_anew(folder)
    return 2


def pickle_as_tensors(folder: Path, song: bytes) -> int:
    next(folder.glob("*.safetensors")).write_bytes(song)
    return 1  # the hash is wrong


def name_a_file_elsewhere(folder: Path, song: bytes) -> int:
    (folder.parent / "x.safetensors").write_bytes(song)
    facts = FileFacts.of(folder.parent / "x.safetensors")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest._replace(files={"../x.safetensors": facts}))
    return 1


def pickle_as_manifest(folder: Path, song: bytes) -> int:
    (folder / "manifest.json").write_bytes(song)
    return 1


def pickle_as_seal_of_format_1(folder: Path, song: bytes) -> int:
    (folder / "manifest.json").unlink()
    (folder / "seal.json").write_bytes(song)
    return 1


@pytest.mark.parametrize(
    "attack",
    [
        poison_metadata,
        poison_and_name_metadata,
        pickle_as_tensors,
        name_a_file_elsewhere,
        pickle_as_manifest,
        pickle_as_seal_of_format_1,
    ],
    ids=lambda attack: attack.__name__,
)
def test_a_poisoned_checkpoint_runs_nothing(saved, song, canary, attack):
    step = attack(saved, song)
    assert load_newest(saved) == step
    checkpoint.find_damage(saved)
    assert not canary.exists()


def pickle_sealed_anew(folder: Path, song: bytes) -> None:
    next(folder.glob("*.safetensors")).write_bytes(song)
    seal_anew(folder)


def other_tensors_sealed_anew(folder: Path, song: bytes) -> None:
    del song
    seal_anew(folder, tensors={"online.w": TensorFacts([7], "float32")})
    shutil.rmtree(folder.parent / "step-00000001")
    donor = Checkpoints(RunConfig(dir=str(folder.parent / "donor"), steps=1), {})
    donor.save(2, {"online.w": Partition.replicated(torch.zeros(7))})
    donor.wait()
    other = checkpoint.list_checkpoints(folder.parent / "donor")[0]
    shutil.rmtree(folder)
    os.rename(other, folder)


@pytest.mark.parametrize(
    "attack", [pickle_sealed_anew, other_tensors_sealed_anew], ids=lambda attack: attack.__name__
)
def test_with_true_hashes_too_it_is_refused_in_one_line(saved, song, canary, attack):
    attack(saved, song)
    with pytest.raises(UserError, match="does not hold the state of this run"):
        load_newest(saved)
    assert not canary.exists()


def test_a_type_that_is_none_is_refused(saved):
    seal_anew(saved, tensors={"online.w": TensorFacts([5], "load")})
    with pytest.raises(UserError, match="no type of tensor"):
        checkpoint.load(saved)


RECIPES: dict[str, Callable[[Path], str]] = {
    "an object": lambda path: f"run: !!python/object/apply:pathlib.Path.touch [{path}]",
    "a call": lambda path: f"run: !!python/object/apply:os.system ['touch {path}']",
    "a name": lambda path: "run: {dir: !!python/name:os.system }",
    "a module": lambda path: "data: !!python/module:os ",
    "a duplicate": lambda path: "run: {steps: 1}\nrun: {steps: 2}",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_that_holds_more_than_plain_values_is_refused(tmp_path, canary, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[kind](canary))
    with pytest.raises(UserError):
        load_recipe(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.safetensors"])
def test_weights_that_are_a_pickle_of_something_else_are_refused(tmp_path, song, canary, name):
    path = tmp_path / name
    path.write_bytes(song)
    with pytest.raises(UserError):
        read_weights(path)
    torch.save({"w": Canary(canary)}, path)
    with pytest.raises(UserError):
        read_weights(path)
    assert not canary.exists()


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Names of the functions that a file calls, such as torch.load."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def keyword(call: ast.Call, name: str) -> object:
    values = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg == name}
    return values.get(name)


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}


def test_no_program_of_ours_opens_what_could_run_code():
    for folder in ("scale_smog", "launcher", "data_tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, call in calls(path):
                assert name not in FORBIDDEN, f"{path}: {name}"
                if name == "torch.load":
                    assert keyword(call, "weights_only") is True, path
                if name == "np.load":
                    assert not keyword(call, "allow_pickle"), path
                if name.endswith(".extractall") or name.endswith(".extract"):
                    assert keyword(call, "filter") == "data", path
                assert keyword(call, "shell") is not True, path
