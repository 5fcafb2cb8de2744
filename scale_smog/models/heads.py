"""Heads: the projector behind each backbone, and what the online net has behind that."""

from collections import OrderedDict
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projector(
    num_features: int,
    hidden: int,
    dim: int,
    activation: type[nn.Module],
    is_normed: bool = True,
) -> nn.Sequential:
    """Features [B, d] to projections [B, D]: linear, BN, activation, linear, BN (SMoG section 3.1).

    The paper leaves open whether the last BN has a scale and a shift; as in MoCo v3, it has none.

    Args:
        num_features: Size d of the backbone's output.
        hidden: Size of the hidden layer.
        dim: Size D of the projections.
        activation: `nn.ReLU` or `nn.GELU`.
        is_normed: Whether the last BN is there; BYOL and SwAV have none.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Linear(num_features, hidden, bias=False),  # the BN behind would cancel a bias
        bn1=nn.BatchNorm1d(hidden),
        act=activation(),
        fc2=nn.Linear(hidden, dim, bias=not is_normed),
    )
    if is_normed:
        layers["bn2"] = nn.BatchNorm1d(dim, affine=False)
    return nn.Sequential(layers)


def predictor(
    dim: int, hidden: int, activation: type[nn.Module], is_normed: bool = False
) -> nn.Sequential:
    """Projections [B, D] to predictions [B, D]: linear, BN, activation, linear (SMoG section 3.1).

    Args:
        dim: Size D of the projections and of the predictions.
        hidden: Size of the hidden layer.
        activation: `nn.ReLU` or `nn.GELU`.
        is_normed: Whether a BN follows, as in MoCo v3.
    """
    return projector(dim, hidden, dim, activation, is_normed)


class Prototypes(nn.Module):
    """K unit vectors that are trained, and the similarities with them (SwAV section 3.1).

    They are normalised where they are used and not after a step: an engine may hold any part of
    them. Their length then changes nothing, nor does what weight decay takes of it.

    Args:
        num: K.
        dim: D.
    """

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num, dim)))
        self.are_frozen = False

    def forward(self, z: Tensor) -> Tensor:
        """Similarities [B, K] of unit features z [B, D], in their precision."""
        weight = self.weight.to(z.dtype)
        if self.are_frozen:
            weight = weight.detach() + 0 * weight  # engines wait for a gradient of every weight
        is_available = torch.amp.is_autocast_available(z.device.type)
        with torch.autocast(z.device.type, enabled=False) if is_available else nullcontext():
            return z @ F.normalize(weight).T


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
