"""Promises of Swin-T and of the backbones that come from timm."""

import pytest
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from scale_smog.errors import UserError
from scale_smog.models import build_backbone
from scale_smog.models.weights import load_weights


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("swin_tiny")


@pytest.mark.parametrize("size_px", [224, 96])
def test_swin_tiny_takes_large_and_small_views(swin: nn.Module, size_px: int) -> None:
    swin.zero_grad()
    features = swin(torch.randn(2, 3, size_px, size_px))
    assert features.shape == (2, swin.num_features) == (2, 768)
    assert features.isfinite().all()

    features.square().mean().backward()
    for name, parameter in swin.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert swin.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["swin_tiny", "swin_tiny_patch4_window7_224"])  # ours, timm's
def test_training_mode_draws_no_random_numbers(name: str) -> None:
    net = build_backbone(name).train()
    images = torch.randn(1, 3, 96, 96)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = net(images), net(images)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_num_features_is_the_size_of_the_output() -> None:
    net = build_backbone("mobilenetv3_small_050")  # keeps a layer behind its pooling
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, net.num_features)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet_tyni", "resnet_tiny"), ("convnext_tinny", "convnext_tiny")]
)
def test_unknown_backbone_is_answered_with_the_nearest_names(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.* '{nearest}'"):
        build_backbone(name, width=2)


def test_width_and_small_images_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(UserError, match=r"width: only resnet_tiny, .* swin_tiny does not"):
        build_backbone("swin_tiny", width=2)
    with pytest.raises(UserError, match="small_images: only"):
        build_backbone("convnext_tiny", small_images=True)


def test_a_vit_takes_both_sizes_of_views_and_its_positions_follow() -> None:
    net = build_backbone("vit_tiny_patch16_224").eval()
    for px in (96, 224):
        images = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            net.pos_embed.normal_()
            before = net(images)
            net.pos_embed[:, 1:] = net.pos_embed[:, 1:].flip(1)  # of the patches
            assert (net(images) - before).abs().max() > 1e-3


def test_positions_of_a_vit_for_other_images_are_resized(tmp_path) -> None:
    import timm

    other = timm.create_model("vit_tiny_patch16_384", num_classes=0).eval()
    with torch.no_grad():  # positions that a resize keeps
        rows = torch.linspace(-1, 1, 24).repeat_interleave(24)[None, :, None]
        other.pos_embed[:, 1:] = rows * torch.ones(192)
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    net = build_backbone("vit_tiny_patch16_224").eval()
    load_weights(net, tmp_path / "vit.pth")
    found = net.pos_embed[0, 1:].view(14, 14, 192)
    assert torch.equal(net.pos_embed[0, 0], other.pos_embed[0, 0])
    assert torch.allclose(found[2:-2], torch.linspace(-1, 1, 14)[2:-2, None, None], atol=0.1)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # a net of timm that is built for 224 px reads the file alike
        timm_net = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
        timm_net.load_state_dict(checkpoint_filter_fn(other.state_dict(), timm_net))
        assert (net(images) - timm_net(images)).abs().max() < 1e-4


def test_an_installed_package_offers_backbones_by_name(tmp_path, monkeypatch) -> None:
    code = "from torch import nn\n\n\ndef build():\n    net = nn.Sequential(nn.Conv2d(3, 5, 3)"
    code += ", nn.AdaptiveAvgPool2d(1), nn.Flatten())\n    net.num_features = 5\n    return net\n"
    (tmp_path / "their_nets.py").write_text(code)
    facts = tmp_path / "their_nets-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-nets\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[scale_smog.backbones]\ntheirs = their_nets:build\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_backbone("theirs")(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(UserError, match="width: only"):
        build_backbone("theirs", width=2)
    with pytest.raises(UserError, match=r"unknown backbone 'their': .*'theirs'"):
        build_backbone("their")
