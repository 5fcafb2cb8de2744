"""For torch.hub: `torch.hub.load("USER/scale_smog", "backbone", "resnet50", weights=...)`."""

dependencies = ["torch", "timm", "safetensors", "pydantic"]


def backbone(name: str = "resnet50", width: int = 1, small_images: bool = False, weights: str = ""):
    """A backbone: images [B, 3, H, W] to features [B, F].

    Args:
        name: resnet_tiny, resnet18, resnet50, swin_tiny, or any name that timm knows.
        width: factor on all channels of a ResNet.
        small_images: a stem for images of about 32 px.
        weights: a file, an exported folder, or hf-hub:USER/NAME; empty: random weights.
    """
    from scale_smog.models import build_backbone
    from scale_smog.models.weights import load_weights

    net = build_backbone(name, width, small_images)
    if weights:
        load_weights(net, weights)
    return net
