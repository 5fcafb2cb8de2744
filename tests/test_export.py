"""Exports load in plain timm and torchvision, and their files start a run."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from ranks import run_on_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from scale_smog import distributed
from scale_smog.checkpoint import nets
from scale_smog.checkpoint.start_from import read_start
from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.export import Exported, _card, export, to_torchvision_swin
from scale_smog.models import build_backbone, build_nets
from scale_smog.models.weights import from_torchvision_swin, load_weights
from scale_smog.pretrain import pretrain
from scale_smog.recipe import dump_recipe
from scale_smog.runtime import run_layout
from scale_smog.state import build_initial_nets


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """Makes a run whose checkpoint holds a given net: real files of large nets cost seconds."""

    def make(backbone: str, **options) -> tuple[Path, torch.nn.Module]:
        own = [f"model.{key}={yaml.safe_dump(value).split()[0]}" for key, value in options.items()]
        recipe = small_recipe(tmp_path, "nowhere", f"model.backbone={backbone}", *own)
        torch.manual_seed(0)
        online, momentum = build_nets(recipe.model)
        with torch.no_grad():  # as after training: statistics and scales are no longer 0 and 1
            for value in [*online.buffers(), *online.parameters()]:
                if value.is_floating_point():
                    value.mul_(1 + 0.1 * torch.rand_like(value)).add_(0.01)
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        (run_dir / run_layout.RECIPE_FILE).write_text(dump_recipe(recipe))
        parts = {"online": online.state_dict(), "momentum": momentum.state_dict()}
        parts["groups"] = {"centroids": torch.eye(3)}
        monkeypatch.setattr(nets, "read_part", lambda folder, part: parts[part])
        monkeypatch.setattr("scale_smog.export.read_part", lambda folder, part: parts[part])
        found = (run_dir / "checkpoints" / "step-00000008", run_dir)
        monkeypatch.setattr("scale_smog.export.find_checkpoint", lambda path: found)
        return run_dir, online.backbone.eval()

    return make


def outputs(net: torch.nn.Module, px: int) -> torch.Tensor:
    images = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net(images)


def as_the_card_says(done: Exported) -> torch.nn.Module:
    """The net that the printed lines load, and nothing besides."""
    assert done.usage in (done.folder / "README.md").read_text()
    names: dict[str, torch.nn.Module] = {}
    exec(done.usage, names)
    return names["net"]


def test_weights_of_resnet50_have_timms_names_and_shapes():
    """Its bottlenecks are compared with torchvision's in models/test_resnet.py."""
    with torch.device("meta"):
        nets = build_backbone("resnet50"), timm.create_model("resnet50", num_classes=0)
    ours, theirs = ({k: x.shape for k, x in net.state_dict().items()} for net in nets)
    assert ours == theirs


def require_described(folder: Path, ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """What a Hugging Face folder says of the net, and timm of the net that it makes of it."""
    assert json.loads((folder / "config.json").read_text())["num_features"] == ours.num_features
    expected = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 1.0}
    for key, value in expected.items():  # crop_pct is of the small recipe
        assert theirs.pretrained_cfg[key] == pytest.approx(value)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm") and "local-dir:" in card


@pytest.mark.parametrize(
    ("backbone", "px", "classifier"), [("resnet18", 64, "fc"), ("swin_tiny", 224, "head")]
)
def test_every_library_gives_the_same_features(
    tmp_path, fake_run, monkeypatch, backbone, px, classifier
):
    run_dir, net = fake_run(backbone)
    monkeypatch.chdir(tmp_path)
    expected = outputs(net, px)
    assert expected.std() > 1e-3

    done = export(str(run_dir), str(tmp_path / "timm"), "timm")
    assert (outputs(as_the_card_says(done), px) - expected).abs().max() <= 1e-5
    assert done.architecture in (done.folder / "README.md").read_text()

    done = export(str(run_dir), str(tmp_path / "hf"), "hf")
    other = as_the_card_says(done)
    assert (outputs(other, px) - expected).abs().max() <= 1e-5
    require_described(done.folder, net, other)
    side = 224 if backbone == "swin_tiny" else 24  # the small recipe's, but timm's Swin has one
    assert list(other.pretrained_cfg["input_size"]) == [3, side, side]

    done = export(str(run_dir), str(tmp_path / "torchvision"), "torchvision")
    other = getattr(torchvision.models, done.architecture)()
    result = other.load_state_dict(load_file(done.folder / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {f"{classifier}.weight", f"{classifier}.bias"}
    assert (outputs(as_the_card_says(done), px) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("resnet18", {"width": 2}), ("resnet18", {"small_images": True}), ("resnet_tiny", {})],
)
def test_a_net_that_no_library_has_comes_with_a_line_that_loads_it(
    tmp_path, fake_run, monkeypatch, backbone, options
):
    run_dir, net = fake_run(backbone, **options)
    monkeypatch.chdir(tmp_path)
    done = export(str(run_dir), "out", "timm")
    assert torch.equal(outputs(as_the_card_says(done), 64), outputs(net, 64))


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_a_stem_that_shapes_do_not_tell_is_told_by_the_file(tmp_path, fake_run, kind):
    run_dir, net = fake_run("resnet_tiny", small_images=True)
    out = tmp_path / "out"
    export(str(run_dir), str(out), kind, with_state=True)
    same, other = (build_backbone("resnet_tiny", small_images=x).eval() for x in (True, False))
    load_weights(same, out)
    assert torch.equal(outputs(same, 24), outputs(net, 24)) and read_start(str(out), net=same)
    words = r"out/\S+ holds another net: its first stride is 1, not 2; change small_images"
    with pytest.raises(UserError, match=words):
        load_weights(other, out)
    with pytest.raises(UserError, match=words):
        read_start(str(out), net=other)
    (out / "training_state.safetensors").unlink()
    with pytest.raises(UserError, match=words):
        read_start(str(out), net=other)


@pytest.fixture
def their_net(tmp_path, monkeypatch) -> str:
    """The name of a backbone that an installed package offers and timm does not know."""
    code = "from torch import nn\n\n\ndef build():\n    net = nn.Sequential(nn.Conv2d(3, 5, 3)"
    code += ", nn.AdaptiveAvgPool2d(1), nn.Flatten())\n    net.num_features = 5\n    return net\n"
    (tmp_path / "their_package.py").write_text(code)
    facts = tmp_path / "their_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    points = "[scale_smog.backbones]\ntheir_net = their_package:build\n"
    (facts / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_net"


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_a_net_of_an_installed_package_comes_with_a_card_that_loads_it(
    tmp_path, fake_run, monkeypatch, their_net, kind
):
    run_dir, net = fake_run(their_net)
    monkeypatch.chdir(tmp_path)
    done = export(str(run_dir), "out", kind)
    assert torch.equal(outputs(as_the_card_says(done), 24), outputs(net, 24))
    card = (tmp_path / "out" / "README.md").read_text()
    assert done.usage in card and "timm.create_model" not in card


def test_the_momentum_net_is_exported_on_request(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars, "run.steps=2")
    pretrain(recipe)
    folder, run_dir = nets.find_checkpoint(Path(recipe.run.dir))
    for net in ("online", "momentum"):
        done = export(str(run_dir), str(tmp_path / net), "timm", net=net)
        kept = nets.read_part(folder, net)
        for name, value in load_file(done.folder / "model.safetensors").items():
            assert torch.equal(value, kept[f"backbone.{name}"])
        assert f"{net} net" in (done.folder / "README.md").read_text()


def test_the_whole_state_has_heads_momentum_net_and_groups(tmp_path, fake_run):
    run_dir, _ = fake_run("resnet_tiny")
    done = export(str(run_dir), str(tmp_path / "out"), "timm", with_state=True)
    names = load_file(done.folder / "training_state.safetensors").keys()
    assert {"online.predictor.fc1.weight", "momentum.projector.fc1.weight"} <= set(names)
    assert "groups.centroids" in names


def test_what_a_library_does_not_have_is_one_clear_line(tmp_path, fake_run):
    run_dir, _ = fake_run("mobilenetv3_small_100")
    with pytest.raises(UserError, match="torchvision has no mobilenetv3_small_100"):
        export(str(run_dir), str(tmp_path / "out"), "torchvision")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", lambda: timm.create_model("resnet18")),
        ("resnet18", lambda: torchvision.models.resnet18()),
        ("swin_tiny", lambda: timm.create_model("swin_tiny_patch4_window7_224")),
        ("swin_tiny", lambda: torchvision.models.swin_t()),
    ],
)
def test_files_of_timm_and_torchvision_start_a_net(tmp_path, name, make):
    foreign = make()
    path = tmp_path / "foreign.pth"
    torch.save(foreign.state_dict(), path)
    net = build_backbone(name)
    load_weights(net, path)
    for classifier in ("fc", "head"):
        if isinstance(getattr(foreign, classifier, None), torch.nn.Linear):
            setattr(foreign, classifier, torch.nn.Identity())
        elif hasattr(foreign, classifier):
            foreign.head.fc = torch.nn.Identity()
    px = 224 if name == "swin_tiny" else 64
    assert (outputs(net.eval(), px) - outputs(foreign.eval(), px)).abs().max() <= 1e-5


def test_names_of_torchvision_lead_back_to_ours():
    weights = build_backbone("swin_tiny").state_dict()
    assert list(from_torchvision_swin(to_torchvision_swin(weights))) == list(weights)


def test_a_run_starts_from_the_weights_of_a_file(tmp_path, tars):
    torch.manual_seed(5)
    start = build_backbone("resnet_tiny").state_dict()
    save_file(start, tmp_path / "start.safetensors")
    # A rate of next to nothing: what the run ends with is what it began with.
    recipe = small_recipe(
        tmp_path,
        tars,
        f"model.weights={tmp_path / 'start.safetensors'}",
        "run.steps=1",
        "optimizer.base_lr=1e-12",
    )
    pretrain(recipe)
    folder, _ = nets.find_checkpoint(Path(recipe.run.dir))
    for part in ("online", "momentum"):
        weights = nets.read_part(folder, part)
        for name in ("conv1.weight", "layer3.0.conv2.weight"):
            assert torch.allclose(weights[f"backbone.{name}"], start[name], atol=1e-6)


def test_weights_of_another_net_are_refused_by_the_first_difference(tmp_path):
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"another net than model.backbone: layer1.0.conv1.weight is"
    ):
        load_weights(build_backbone("resnet50"), tmp_path / "a.pth")
    torch.save({"x": object}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="does not hold plain weights"):
        load_weights(build_backbone("resnet_tiny"), tmp_path / "b.pth")
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_backbone("resnet_tiny"), tmp_path / "none.pth")


def test_a_card_names_the_runs_own_method_and_library(tmp_path):
    recipe = small_recipe(tmp_path, "nowhere", "method.name=simclr")
    card = _card(recipe, "run", 8, "", "hf", library="scale_smog")
    assert card.startswith("---\nlibrary_name: scale_smog\ntags: [image-feature-extraction,")
    assert "SimCLR (Chen et al., ICML 2020)" in card and "groups |" not in card


def test_an_export_leaves_nothing_of_the_one_before(tmp_path, fake_run):
    run_dir, _ = fake_run("resnet_tiny")
    out = tmp_path / "out"
    export(str(run_dir), str(out), "timm", with_state=True)
    export(str(run_dir), str(out), "timm")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "README.md"}


def test_the_whole_state_goes_with_the_online_net_alone(tmp_path, fake_run):
    run_dir, _ = fake_run("resnet_tiny")
    with pytest.raises(UserError, match="--full goes with --net online"):
        export(str(run_dir), str(tmp_path / "out"), "timm", with_state=True, net="momentum")


def test_a_disk_that_is_full_is_one_clear_line(tmp_path, fake_run, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run_dir, _ = fake_run("resnet_tiny")
    monkeypatch.setattr("scale_smog.export.save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*out: I/O error: No space left"):
        export(str(run_dir), str(tmp_path / "out"), "timm")


def test_a_card_says_what_the_run_began_with(tmp_path):
    start = "model.weights=https://user:s3cret@host/supervised.pth"
    recipe = small_recipe(tmp_path, "nowhere", start)
    card = _card(recipe, "run", 8, "", "hf", library="scale_smog")
    assert "trained further without labels" in card
    assert "| began with | https://host/supervised.pth |" in card
    assert "| began with | random weights |" in _card(
        small_recipe(tmp_path, "nowhere"), "run", 8, "", "hf", library="scale_smog"
    )


def first_weights(recipe: Recipe) -> torch.Tensor:
    """On a rank whose host has no such file, unless it is rank 0."""
    model = recipe.model
    if not distributed.is_main():
        model = model.model_copy(update={"weights": "nowhere"})
    online, _ = build_initial_nets(model, recipe.nets)
    return online.backbone.state_dict()["conv1.weight"]


def test_rank_0_alone_reads_or_fetches_the_first_weights(tmp_path):
    start = build_backbone("resnet_tiny").state_dict()
    save_file(start, tmp_path / "start.safetensors")
    recipe = small_recipe(tmp_path, "nowhere", f"model.weights={tmp_path / 'start.safetensors'}")
    for found in run_on_ranks(2, first_weights, recipe):
        assert torch.equal(found, start["conv1.weight"])
