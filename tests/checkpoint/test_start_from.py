"""A run that begins with what another one has learnt."""

import shutil
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe

from scale_smog import UserError, checkpoint
from scale_smog.checkpoint.start_from import Start, fitting
from scale_smog.distributed import Partition
from scale_smog.export import export
from scale_smog.models import build_backbone
from scale_smog.pretrain import pretrain
from scale_smog.recipe import load_recipe
from scale_smog.runtime import run_layout

# No step that changes anything: what the run ends with is what it began with.
RESTING = (
    *("run.steps=1", "run.seed=7", "optimizer.base_lr=1e-30"),
    *("model.ema=1.0", "grouping.beta_start=1.0"),
)


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.list_checkpoints(run_dir)[-1])[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory, tars) -> Path:
    """A run whose two nets differ."""
    recipe = small_recipe(tmp_path_factory.mktemp("source"), tars, "run.steps=5")
    pretrain(recipe)
    return Path(recipe.run.dir)


def begun(folder: Path, tars: Path, source: Path | str, *overrides: str) -> Path:
    recipe = small_recipe(folder, tars, *RESTING, f"run.start_from={source}", *overrides)
    pretrain(recipe)
    return Path(recipe.run.dir)


def parameters(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Of a net: a step in training mode moves the statistics of batch norms."""
    is_weight = {k: v for k, v in state.items() if k.startswith(f"{part}.") and "running" not in k}
    return {k: v for k, v in is_weight.items() if "num_batches" not in k}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_a_run_begins_with_nets_and_groups_of_another(tmp_path, tars, source, capsys):
    run_dir = begun(tmp_path, tars, source)
    before, after = final_state(source), final_state(run_dir)
    for part in ("online", "momentum"):
        assert_close(parameters(after, part), parameters(before, part))
    assert torch.allclose(after["groups.centroids"], before["groups.centroids"], atol=1e-5)
    kept = load_recipe(run_dir / run_layout.RECIPE_FILE).run
    assert kept.start_from == str(source) and len(kept.start_sha256) == 64
    assert f"groups: from {source}" in capsys.readouterr().out


def test_other_groups_crops_and_batch_are_allowed_and_said(tmp_path, tars, source, capsys):
    other = ["grouping.num_groups=7", "data.global_batch=8", "data.num_small_crops=1"]
    run_dir = begun(tmp_path, tars, source, *other)
    out = capsys.readouterr().out
    assert "groups: initialised as usual (groups.centroids is (10, 16), not (7, 16))" in out
    for key, change in (
        ("data.global_batch", "12 -> 8"),
        ("data.num_small_crops", "0 -> 1"),
        ("grouping.num_groups", "10 -> 7"),
    ):
        assert f"another {key} than the start: {change}" in out
    assert_close(
        parameters(final_state(run_dir), "online"), parameters(final_state(source), "online")
    )


def test_heads_that_do_not_fit_are_initialised_anew_and_the_groups_with_them(
    tmp_path, tars, source, capsys
):
    run_dir = begun(tmp_path, tars, source, "model.dim=8")
    out = capsys.readouterr().out
    assert (
        "heads: initialised as usual (online.projector.bn2.running_mean is (16,), not (8,))" in out
    )
    assert "momentum: initialised as usual" in out and "groups: initialised as usual" in out
    before, after = final_state(source), final_state(run_dir)
    own = parameters(before, "online.backbone")
    assert_close(parameters(after, "online.backbone"), own)
    leaders = {k.replace("online.", "momentum."): v for k, v in own.items()}
    assert_close(parameters(after, "momentum.backbone"), leaders)  # a copy of the online net


def test_groups_and_momentum_net_are_initialised_anew_where_heads_are_though_their_shapes_fit():
    shapes = {
        "online.backbone.w": 4, "online.projector.w": 4, "momentum.backbone.w": 4,
        "momentum.projector.w": 4, "groups.centroids": 4,
    }  # fmt: skip
    own = {k: Partition.replicated(torch.zeros(n)) for k, n in shapes.items()}
    tensors = {k: torch.ones(n) for k, n in shapes.items()}
    start = Start(tensors | {"online.projector.w": torch.ones(3)}, None)
    values, lines = fitting(start, own, ["backbone", "heads", "momentum", "groups"], "it")
    assert set(values) == {"online.backbone.w", "momentum.backbone.w"}  # a copy of the first
    assert lines[2:] == [
        f"{part}: initialised as usual (of other heads)" for part in ("momentum", "groups")
    ]


def test_what_is_known_of_each_image_is_not_taken_to_other_images():
    names = ("online.backbone.w", "online.projector.w", "groups.features", "groups.centroids")
    own = {name: Partition.replicated(torch.zeros(4)) for name in names}
    start = Start({name: torch.ones(4) for name in names}, None)
    values, lines = fitting(start, own, ["backbone", "heads", "groups"], "it")
    assert "groups.centroids" not in values
    assert lines[2] == "groups: initialised as usual (of the images that the start was trained on)"


def test_parts_can_be_chosen(tmp_path, tars, source):
    run_dir = begun(tmp_path, tars, source, "run.start_parts=[backbone]")
    before, after = final_state(source), final_state(run_dir)
    assert_close(parameters(after, "online.backbone"), parameters(before, "online.backbone"))
    name = "online.projector.fc1.weight"
    assert not torch.allclose(before[name], after[name], atol=1e-3)


def test_a_run_its_export_and_a_file_of_it_are_one_start(tmp_path, tars, source):
    whole = export(str(source), str(tmp_path / "whole"), "timm", with_state=True).folder
    plain = export(str(source), str(tmp_path / "plain"), "timm").folder
    hashes, states = set(), {}
    for name, place in (
        ("run", source),
        ("checkpoint", checkpoint.list_checkpoints(source)[-1]),
        ("whole", whole),
        ("plain", plain),
        ("file", plain / "model.safetensors"),
    ):
        run_dir = begun(tmp_path / name, tars, place)
        hashes.add(load_recipe(run_dir / run_layout.RECIPE_FILE).run.start_sha256)
        states[name] = final_state(run_dir)
    assert len(hashes) == 1
    assert_close(states["whole"], states["run"])
    assert_close(states["plain"], states["file"])
    assert_close(
        parameters(states["plain"], "online.backbone"), parameters(states["run"], "online.backbone")
    )


def test_a_run_that_has_begun_goes_on_without_its_start(tmp_path, tars, source):
    copy = shutil.copytree(source, tmp_path / "copy")
    begun(tmp_path, tars, copy)
    shutil.rmtree(copy)
    run_dir = begun(tmp_path, tars, copy, "run.steps=3")
    assert checkpoint.list_checkpoints(run_dir)[-1].name == "step-00000003"


def test_what_is_no_start_is_refused_in_a_line_and_leaves_no_folder(tmp_path, tars, source):
    for start, overrides, words in (
        ("nowhere", [], "run.start_from=nowhere: no such file"),
        (source, ["model.backbone=resnet18"], r"holds another net: online\.backbone\."),
        (source, [f"run.start_sha256={'0' * 64}"], "other weights than run.start_sha256 says"),
    ):
        with pytest.raises(UserError, match=words):
            begun(tmp_path, tars, start, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_does_not_need_its_first_weights(tmp_path, tars):
    weights = tmp_path / "w.pth"
    torch.save(build_backbone("resnet_tiny").state_dict(), weights)
    own = (f"model.weights={weights}", "run.steps=4")
    pretrain(small_recipe(tmp_path, tars, *own))
    weights.unlink()
    pretrain(small_recipe(tmp_path, tars, own[0], "run.steps=6"))
    newest = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step-00000006"
