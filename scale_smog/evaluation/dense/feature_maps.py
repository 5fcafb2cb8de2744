"""A ResNet's stages as feature maps, and its dilation."""

from torch import nn

from scale_smog.errors import UserError
from scale_smog.models.resnet import ResNet


def require_resnet(net: nn.Module, purpose: str) -> ResNet:
    """The same net; raises a UserError unless it is a ResNet, with the maps of its stages."""
    if not isinstance(net, ResNet):
        raise UserError(
            f"{purpose} needs a ResNet's feature maps, and the checkpoint holds a "
            f"{type(net).__name__}"
        )
    return net


def stage_names(net: ResNet) -> list[str]:
    """Its stages, from the largest map to the smallest."""
    return [f"layer{index + 1}" for index in range(net.num_stages)]


def stage_channels(net: ResNet) -> list[int]:
    """Channels of each stage's map: they double from one to the next."""
    return [net.num_features // 2 ** (net.num_stages - 1 - i) for i in range(net.num_stages)]


def dilate(net: ResNet, num_stages: int = 2) -> None:
    """Makes the last stages dilate instead of stride, in place; the weights stay as they are.

    As torchvision's `replace_stride_with_dilation`: maps of 1/8 of the image instead of 1/32, the
    first block of a stage with the dilation of the stage before.
    """
    dilation = 1
    for name in stage_names(net)[-num_stages:]:
        for number, block in enumerate(getattr(net, name)):
            own = dilation if number == 0 else 2 * dilation
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (own, own)
        dilation *= 2
