"""The two heads of SMoG: the projector behind each backbone and the predictor of the online net."""

from collections import OrderedDict

import torch
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


@torch.no_grad()
def start_as_identity(head: nn.Sequential) -> None:
    """Gives a predictor the weights with which its predictions are its projections.

    The paper leaves the first weights open. Projections x [B, D] are standardised, so the batch
    norm leaves x and -x as they are, and x = relu(x) - relu(-x). The other hidden units keep their
    random inputs and begin without a say in the output. With GELU the start is near the identity.

    Args:
        head: of `predictor`, at least 2 D wide.
    """
    first, last = head.get_submodule("fc1"), head.get_submodule("fc2")
    weights, readout, bias = first.weight, last.weight, last.bias
    assert isinstance(weights, torch.Tensor) and isinstance(readout, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    dim = weights.shape[1]
    eye = torch.eye(dim, dtype=weights.dtype, device=weights.device)
    weights[:dim], weights[dim : 2 * dim] = eye, -eye  # [hidden, D]
    readout.zero_()  # [D, hidden]
    readout[:, :dim], readout[:, dim : 2 * dim] = eye, -eye
    bias.zero_()


def head_activation(backbone: nn.Module) -> type[nn.Module]:
    """The activation of the heads: ReLU behind batch-normalised nets, GELU behind transformers."""
    batch_normalised = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    return nn.ReLU if batch_normalised else nn.GELU
