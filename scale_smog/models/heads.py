"""The two heads of SMoG: the projector behind each backbone and the predictor of the online net."""

from collections import OrderedDict

from torch import nn


def projector(
    num_features: int, hidden: int, dim: int, activation: type[nn.Module]
) -> nn.Sequential:
    """Features [B, d] to projections [B, D]: linear, BN, activation, linear, BN (SMoG section 3.1).

    The paper leaves open whether the last BN has a scale and a shift; as in MoCo v3, it has none.

    Args:
        num_features: Size d of the backbone's output.
        hidden: Size of the hidden layer.
        dim: Size D of the projections.
        activation: `nn.ReLU` or `nn.GELU`.
    """
    layers = OrderedDict(
        fc1=nn.Linear(num_features, hidden, bias=False),  # the BN behind would cancel a bias
        bn1=nn.BatchNorm1d(hidden),
        act=activation(),
        fc2=nn.Linear(hidden, dim, bias=False),
        bn2=nn.BatchNorm1d(dim, affine=False),
    )
    return nn.Sequential(layers)


def predictor(dim: int, hidden: int, activation: type[nn.Module]) -> nn.Sequential:
    """Projections [B, D] to predictions [B, D]: linear, BN, activation, linear (SMoG section 3.1).

    Args:
        dim: Size D of the projections and of the predictions.
        hidden: Size of the hidden layer.
        activation: `nn.ReLU` or `nn.GELU`.
    """
    layers = OrderedDict(
        fc1=nn.Linear(dim, hidden, bias=False),
        bn1=nn.BatchNorm1d(hidden),
        act=activation(),
        fc2=nn.Linear(hidden, dim),
    )
    return nn.Sequential(layers)


def head_activation(backbone: nn.Module) -> type[nn.Module]:
    """The activation of the heads: ReLU behind batch-normalised nets, GELU behind transformers."""
    batch_normalised = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    return nn.ReLU if batch_normalised else nn.GELU
