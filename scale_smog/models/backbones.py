"""Every backbone by its name: our ResNets and Swin-T, those of installed packages, and timm's.

A package offers nets of its own as entry points of the group `scale_smog.backbones`: a name, and a
function without arguments that builds the net. Recipes name them as any other, and never a module.
"""

import re
from collections.abc import Callable
from importlib.metadata import entry_points

from torch import nn

from scale_smog.errors import UserError
from scale_smog.models import resnet, timm_nets

RESNETS = {
    "resnet_tiny": resnet.resnet_tiny,
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
}
ENTRY_POINTS = "scale_smog.backbones"
SWIN_TINY = "swin_tiny_patch4_window7_224"  # Swin-T (Liu et al. 2021): 768 features
STAGE_NAME = re.compile(r"(layer|s)\d+")


def build_backbone(
    name: str, width: int = 1, small_images: bool = False, drop_path: float = 0.0
) -> nn.Module:
    """Builds a backbone with random weights and no classifier.

    Args:
        name: `resnet_tiny`, `resnet18`, `resnet50`, `swin_tiny`, a name that an installed package
            offers, or any that timm knows.
        width: Factor on all channels, for the ResNets only.
        small_images: A stem for images of about 32 px, for the ResNets only.
        drop_path: Largest rate of drop path, for timm's nets that have it.

    Returns:
        A net from images [B, 3, H, W] to features [B, d]; its attribute `num_features` is d.

    Raises:
        UserError: There is no such net, or it has no such width or stem, or no drop path.
    """
    if width < 1:
        raise UserError(f"width: {width} is not a factor on channels; the smallest is 1")
    if name in RESNETS and not drop_path:
        return RESNETS[name](width, small_images)
    offered = entry_points(group=ENTRY_POINTS)
    if drop_path and name in {*RESNETS, *offered.names}:
        raise UserError(f"drop_path: {name} has none: take 0, or a net of timm's")
    if name != "swin_tiny" and name not in offered.names:
        others = [*RESNETS, "swin_tiny", *offered.names]
        timm_nets.require_timm_name(name, other_names=others)
    if width != 1 or small_images:
        option = "width" if width != 1 else "small_images"
        raise UserError(f"{option}: only {', '.join(RESNETS)} have it, {name} does not")
    if name in offered.names:
        build: Callable[[], nn.Module] = offered[name].load()
        return build()
    return timm_nets.timm_net(SWIN_TINY if name == "swin_tiny" else name, drop_path)


def stages(backbone: nn.Module) -> list[nn.Module]:
    """The parts of a backbone to be compiled, checkpointed or sharded one by one, in order.

    These are `layer1`, `layer2`, … of a ResNet (in timm's RegNets `s1`, …), and what timm's other
    nets hold in `layers`, `stages` or `blocks`; of a net with other names, the net itself.
    """
    children = dict(backbone.named_children())
    for name in ("layers", "stages", "blocks"):
        if name in children:
            return list(children[name].children())
    return [x for name, x in children.items() if STAGE_NAME.fullmatch(name)] or [backbone]
