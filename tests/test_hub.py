"""Nets on a hub: put there, and loaded by their names, over a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe

from scale_smog.checkpoint.nets import find_checkpoint, load_net
from scale_smog.export import export
from scale_smog.models import build_backbone
from scale_smog.models.weights import load_weights
from scale_smog.pretrain import pretrain

ROOT = Path(__file__).parent.parent


NETS = {  # of a run
    "known": ["model.backbone=resnet18"],
    "own": ["model.backbone=resnet_tiny", "model.small_images=true"],
}


def images(num: int = 2, px: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, px, px, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tars) -> dict[str, Path]:
    """A run of a net that timm has, and one of a net that it does not have."""
    made = {}
    for name, options in NETS.items():
        folder = tmp_path_factory.mktemp(name)
        pretrain(small_recipe(folder, tars, "run.steps=1", *options))
        made[name] = folder / "run"
    return made


def features_of(run_dir: Path) -> torch.Tensor:
    """Of the checkpoint's backbone."""
    folder, _ = find_checkpoint(run_dir)
    name = "own" if run_dir.parent.name.startswith("own") else "known"
    recipe = small_recipe(run_dir.parent, "x", *NETS[name])
    with torch.no_grad():
        return load_net(folder, recipe.model, recipe.nets).backbone.eval()(images())


PROGRAM = """
import sys, torch
from pathlib import Path
from scale_smog.cli.main import run_command
from scale_smog.errors import UserError
def push(run, name, *options):
    try:
        to = ["out-" + name, "--format", "hf", *options, "--push", "user/" + name]
        run_command("export", [sys.argv[1] + "/" + run, *to])
    except SystemExit as end:
        assert not end.code
for name in ("known", "own"):
    push(name, name, "--full")
push("known", "again", "--full")
push("known", "again")
import timm, torch
from scale_smog.models import build_backbone
from scale_smog.models.hub import hub_net
from scale_smog.models.weights import load_weights
ours = build_backbone("resnet_tiny", small_images=True)
load_weights(ours, "hf-hub:user/own")
plain = build_backbone("resnet18")
load_weights(plain, "hf-hub:user/known@main")
nets = {
    "known": [
        timm.create_model("hf-hub:user/known", pretrained=True),
        plain,
        torch.hub.load(sys.argv[2], "backbone", "resnet18", weights="hf-hub:user/known",
                       source="local"),
    ],
    "own": [hub_net("user/own"), ours],
}
images = torch.load("images.pt")
with torch.no_grad():
    torch.save({k: [net.eval()(images) for net in v] for k, v in nets.items()}, "features.pt")
from scale_smog.checkpoint.start_from import read_start
for name in ("known", "own"):
    places = ("hf-hub:user/" + name, "out-" + name, sys.argv[1] + "/" + name)
    starts = [read_start(place) for place in places]
    assert len({start.sha256 for start in starts}) == 1
    for start in starts:
        assert start.tensors.keys() == starts[0].tensors.keys()
        assert all(torch.equal(v, starts[0].tensors[k]) for k, v in start.tensors.items())
assert all(x.startswith("online.backbone.") for x in read_start("hf-hub:user/again").tensors)
import huggingface_hub
real = huggingface_hub.hf_hub_download
def times_out(repository, file, **options):
    if file == "training_state.safetensors":
        raise TimeoutError("the hub is slow today")
    return real(repository, file, **options)
huggingface_hub.hf_hub_download = times_out
try:
    read_start("hf-hub:user/known")
except UserError as error:
    print(error)
try:
    load_weights(plain, "hf-hub:user/nothing")
except UserError as error:
    print(error)
"""


def test_pushed_nets_are_loaded_by_name_and_give_the_same_features(tmp_path, runs):
    for name, run_dir in runs.items():
        (tmp_path / name).symlink_to(run_dir)
    torch.save(images(), tmp_path / "images.pt")
    with HubServer(tmp_path / "hub") as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_any",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(ROOT)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert f"pushed to {server.url}/user/known" in done.stdout
    assert "hf-hub:user/nothing: cannot fetch model.safetensors" in done.stdout
    assert "hf-hub:user/known: cannot fetch training_state.safetensors: the hub" in done.stdout
    left = {path.name for path in (tmp_path / "hub/user/again").iterdir()}
    assert left == {"model.safetensors", "config.json", "README.md"}
    assert "Synchronous Momentum Grouping" in (tmp_path / "hub/user/own/README.md").read_text()
    for name, features in torch.load(tmp_path / "features.pt").items():
        for found in features:
            assert (found - features_of(runs[name])).abs().max() <= 1e-5


def test_onnx_gives_the_same_features_for_any_batch(tmp_path, runs):
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    done = export(str(runs["own"]), str(tmp_path / "out"), "onnx")
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"))
    folder, _ = find_checkpoint(runs["own"])
    recipe = small_recipe(tmp_path, "x", *NETS["own"])
    net = load_net(folder, recipe.model, recipe.nets).backbone.eval()
    for num in (1, 5):
        batch = images(num, px=24)
        (found,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(found) - net(batch)).abs().max() <= 1e-4


def test_an_exported_folder_starts_a_net(tmp_path, runs):
    done = export(str(runs["known"]), str(tmp_path / "out"), "timm")
    net = build_backbone("resnet18")
    load_weights(net, done.folder)
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), features_of(runs["known"]))


def test_a_wrapper_around_all_weights_is_taken_off(tmp_path):
    net = build_backbone("resnet_tiny")
    wrapped = {f"module.{name}": value for name, value in net.state_dict().items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    other = build_backbone("resnet_tiny")
    load_weights(other, tmp_path / "wrapped.safetensors")
    assert load_file(tmp_path / "wrapped.safetensors").keys() == wrapped.keys()
    assert torch.equal(other.conv1.weight, net.conv1.weight)


def test_only_a_folder_for_the_hub_is_pushed(tmp_path, capsys):
    from scale_smog.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["export", "x", str(tmp_path), "--format", "timm", "--push", "user/name"])
    assert end.value.code == 2 and "--push takes --format hf" in capsys.readouterr().err
