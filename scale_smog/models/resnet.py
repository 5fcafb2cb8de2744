"""ResNets of any width, with torchvision's parameter names and the pooled features as output."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Stem(NamedTuple):
    """The first convolution, and whether a 3x3 max-pool of stride 2 follows it."""

    kernel_px: int
    stride: int
    max_pool: bool


IMAGENET_STEM = Stem(kernel_px=7, stride=2, max_pool=True)
SMALL_IMAGE_STEM = Stem(kernel_px=3, stride=1, max_pool=False)
TINY_STEM = Stem(kernel_px=3, stride=2, max_pool=False)


def conv(in_channels: int, out_channels: int, kernel_px: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias: a batch norm always follows, and would cancel it."""
    return nn.Conv2d(in_channels, out_channels, kernel_px, stride, kernel_px // 2, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a block's input to the shape of its output; None where they agree."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, channels, H/stride, W/stride]
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 has the stride ("v1.5")."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4·channels, H/stride, W/stride]
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock] | type[Bottleneck]


def stage(block: Block, in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` blocks, of which the first strides."""
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(channels * block.expansion, channels, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """A ResNet without classifier (He et al. 2016).

    Its stages, to be compiled, checkpointed or sharded one by one, are `layer1`, `layer2`, …

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks of each stage; each stage after the first halves the image and doubles
            the channels.
        channels: Channels of the stem, and of the first stage before the blocks' expansion.
        stem: The first convolution.

    Attributes:
        num_features: Size d of the output.
    """

    def __init__(self, block: Block, depths: Sequence[int], channels: int, stem: Stem) -> None:
        super().__init__()
        self.conv1 = conv(3, channels, stem.kernel_px, stem.stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem.max_pool else nn.Identity()

        self.num_stages = len(depths)
        in_channels = channels
        for index, depth in enumerate(depths):
            stride = 1 if index == 0 else 2
            layer = stage(block, in_channels, channels * 2**index, depth, stride)
            self.add_module(f"layer{index + 1}", layer)
            in_channels = channels * 2**index * block.expansion
        self.num_features = in_channels
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] to their pooled features [B, d]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for index in range(self.num_stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return x.mean(dim=(2, 3))  # no view, as of a pooling module: FSDP2 warns of those


def resnet50(width: int = 1, small_images: bool = False) -> ResNet:
    """ResNet-50 whose every layer, the stem included, is `width` times as wide.

    The paper's x1, x2 and x4 have 23.51, 93.91 and 375.38 million parameters and 2048·width
    features. (torchvision's `wide_resnet50_2` is another net: it widens the 3x3 convolutions only.)

    Args:
        width: Factor on all channel counts.
        small_images: A 3x3 stem of stride 1 without max-pool, for images of about 32 px.
    """
    stem = SMALL_IMAGE_STEM if small_images else IMAGENET_STEM
    return ResNet(Bottleneck, (3, 4, 6, 3), channels=64 * width, stem=stem)


def resnet18(width: int = 1, small_images: bool = False) -> ResNet:
    """ResNet-18 with 512·width features; the arguments are `resnet50`'s."""
    stem = SMALL_IMAGE_STEM if small_images else IMAGENET_STEM
    return ResNet(BasicBlock, (2, 2, 2, 2), channels=64 * width, stem=stem)


def resnet_tiny(width: int = 1, small_images: bool = False) -> ResNet:
    """A net of 0.31 M parameters and 128·width features, for a CPU; arguments as `resnet50`'s."""
    stem = SMALL_IMAGE_STEM if small_images else TINY_STEM
    return ResNet(BasicBlock, (1, 1, 1), channels=32 * width, stem=stem)
