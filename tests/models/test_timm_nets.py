"""Promises of Swin-T and of the backbones that come from timm."""

import pytest
import torch
from torch import nn

from scale_smog.errors import UserError
from scale_smog.models import build_backbone


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
    images = torch.randn(1, 3, 224, 224)
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
