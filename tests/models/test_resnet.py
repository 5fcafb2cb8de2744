"""Promises of the ResNets."""

import pytest
import torch
import torchvision
from torch import nn

from scale_smog.errors import UserError
from scale_smog.models import build_backbone


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("width", "millions"), [(1, 23.51), (2, 93.91), (4, 375.38)])
def test_widths_have_the_papers_parameter_counts(width: int, millions: float) -> None:
    with torch.device("meta"):
        net = build_backbone("resnet50", width=width)
        features = net(torch.empty(2, 3, 224, 224))
    assert round(num_parameters(net) / 1e6, 2) == millions
    assert features.shape == (2, net.num_features) == (2, 2048 * width)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_equal_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    ours = build_backbone(name)
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 64, 64)
    for training in (True, False):  # training first, so that the running statistics are in use
        ours.train(training)
        theirs.train(training)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), dict(theirs.state_dict()), rtol=0, atol=1e-6)


def test_convolutions_start_with_the_variance_of_he_et_al() -> None:
    torch.manual_seed(0)
    net = build_backbone("resnet18")
    for weight in (net.conv1.weight, net.layer2[0].conv1.weight, net.layer4[1].conv2.weight):
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18", "resnet50"])
def test_small_image_stem_keeps_the_resolution(name: str) -> None:
    net = build_backbone(name, small_images=True)
    sizes = []
    net.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    net(torch.randn(2, 3, 32, 32))
    assert sizes == [(32, 32)]


def test_resnet_tiny_is_tiny() -> None:
    net = build_backbone("resnet_tiny")
    assert 0.30e6 < num_parameters(net) < 0.32e6
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, net.num_features) == (2, 128)
    with torch.device("meta"):
        assert build_backbone("resnet_tiny", width=2).num_features == 256


def test_activations_stay_channels_last() -> None:
    net = build_backbone("resnet18")
    outputs = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda *call: outputs.append(call[2]))
    net(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert len(outputs) == 40
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_width_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="width: 0"):
        build_backbone("resnet18", width=0)
