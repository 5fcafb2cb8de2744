"""A backbone of ours as the hub's library saves and loads it."""

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from scale_smog.models.backbones import build_backbone


class HubNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="scale_smog",
    tags=["image-feature-extraction"],
    license="apache-2.0",
):
    """A backbone that neither timm nor torchvision has, with what it is built by in config.json.

    Args:
        name: of the backbone.
        width: factor on all channels.
        small_images: a stem for images of about 32 px.
    """

    def __init__(self, name: str, width: int = 1, small_images: bool = False) -> None:
        super().__init__()
        self.backbone = build_backbone(name, width, small_images)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F] of images [B, 3, H, W]."""
        return self.backbone(images)
