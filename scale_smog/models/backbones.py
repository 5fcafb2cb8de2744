"""Every backbone by its name: our ResNets and Swin-T, and whatever else timm has."""

import re

from torch import nn

from scale_smog.errors import UserError
from scale_smog.models import resnet, timm_nets

RESNETS = {
    "resnet_tiny": resnet.resnet_tiny,
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
}
STAGE_NAME = re.compile(r"(layer|s)\d+")


def build_backbone(name: str, width: int = 1, small_images: bool = False) -> nn.Module:
    """Builds a backbone with random weights and no classifier.

    Args:
        name: `resnet_tiny`, `resnet18`, `resnet50`, `swin_tiny`, or any name that timm knows.
        width: Factor on all channels, for the ResNets only.
        small_images: A stem for images of about 32 px, for the ResNets only.

    Returns:
        A net from images [B, 3, H, W] to features [B, d]; its attribute `num_features` is d.

    Raises:
        UserError: There is no such net, or it has no such width or stem.
    """
    if width < 1:
        raise UserError(f"width: {width} is not a factor on channels; the smallest is 1")
    if name in RESNETS:
        return RESNETS[name](width, small_images)
    if name != "swin_tiny":
        timm_nets.require_timm_name(name, other_names=[*RESNETS, "swin_tiny"])
    if width != 1 or small_images:
        option = "width" if width != 1 else "small_images"
        raise UserError(f"{option}: only {', '.join(RESNETS)} have it, {name} does not")
    return timm_nets.swin_tiny() if name == "swin_tiny" else timm_nets.timm_net(name)


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
