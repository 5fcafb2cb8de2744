"""Swin-T and every other net of timm, without classifier and without randomness."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torch import nn

from scale_smog.errors import UserError


def swin_tiny() -> nn.Module:
    """Swin-T (Liu et al. 2021) with 768 features, for views of any size, such as 224 and 96 px."""
    return _create("swin_tiny_patch4_window7_224", strict_img_size=False)


def timm_backbone(name: str) -> nn.Module:
    """The timm net `name`, with random weights and no classifier."""
    return _create(name)


def require_timm_name(name: str, other_names: Iterable[str]) -> None:
    """Raises a UserError with the closest of timm's and `other_names` unless timm has `name`."""
    import timm  # takes seconds to import, and a ResNet never needs it

    if timm.is_model(name):
        return
    close = get_close_matches(name, [*other_names, *timm.list_models()])
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see timm.list_models()"
    raise UserError(f"unknown backbone {name!r}: {hint}")


def _create(name: str, **arguments: Any) -> nn.Module:
    import timm

    net = timm.create_model(name, num_classes=0, **arguments)
    # MobileNetV3 and its kin keep a layer behind the pooling: their output has another size.
    net.num_features = getattr(net, "head_hidden_size", None) or net.num_features
    return _without_randomness(net)


def _without_randomness(net: nn.Module) -> nn.Module:
    """Turns dropout and drop-path off: the paper names no rates, and a step must be repeatable."""
    from timm.layers.drop import DropPath

    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return net
