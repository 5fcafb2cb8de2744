"""Promises of projector and predictor."""

import pytest
import torch
from torch import nn

from scale_smog.models import build_backbone, heads


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_resnet50_heads_have_the_papers_parameter_counts() -> None:
    assert round(num_parameters(heads.projector(2048, 2048, 128, nn.ReLU)) / 1e6, 2) == 4.46
    assert round(num_parameters(heads.predictor(128, 2048, nn.ReLU)) / 1e6, 2) == 0.53


def test_projections_are_standardised_and_predictions_are_not() -> None:
    torch.manual_seed(0)
    z = heads.projector(16, 32, 8, nn.ReLU)(torch.randn(64, 16))  # [B, D]
    torch.testing.assert_close(z.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(8), rtol=0, atol=1e-3)

    p = heads.predictor(8, 32, nn.ReLU)(z)  # [B, D]
    assert p.shape == z.shape
    assert (p.var(0, correction=0) < 0.9).all()


def test_only_the_predictors_last_layer_has_a_bias() -> None:
    projector, predictor = heads.projector(16, 32, 8, nn.ReLU), heads.predictor(8, 32, nn.ReLU)
    linears = [m for head in (projector, predictor) for m in head if isinstance(m, nn.Linear)]
    assert [linear.bias is not None for linear in linears] == [False, False, False, True]
    assert projector[-1].weight is None  # batch norm without affine


@pytest.mark.parametrize(("backbone", "expected"), [("resnet18", nn.ReLU), ("swin_tiny", nn.GELU)])
def test_activation_follows_the_backbone(backbone: str, expected: type[nn.Module]) -> None:
    with torch.device("meta"):
        activation = heads.head_activation(build_backbone(backbone))
    assert activation is expected
    assert isinstance(heads.projector(16, 32, 8, activation).act, expected)
    assert isinstance(heads.predictor(8, 32, activation).act, expected)


def test_an_identity_predictor_begins_with_the_projections_and_learns() -> None:
    torch.manual_seed(0)
    z = heads.projector(16, 32, 8, nn.ReLU)(torch.randn(64, 16))  # [B, D]
    predictor = heads.predictor(8, 32, nn.ReLU)
    heads.start_as_identity(predictor)
    torch.testing.assert_close(predictor(z), z, rtol=0, atol=1e-3)
    predictor(z).square().sum().backward()
    assert (predictor.fc2.weight.grad[:, 16:] != 0).any()  # the idle units can join in
