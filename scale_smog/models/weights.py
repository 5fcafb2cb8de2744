"""Files of weights that others trained: read, renamed to our keys, put into a backbone."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scale_smog.errors import UserError
from scale_smog.models.hub import HUB, WEIGHTS_FILE, fetch
from scale_smog.models.resnet import ResNet
from scale_smog.models.timm_nets import classifier_names, with_resized_positions

Weights = dict[str, Tensor]

CLASSIFIERS = {"fc", "head", "classifier"}  # of torchvision's nets; timm's say it themselves


def backbone_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of a backbone's names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def from_torchvision_swin(weights: Weights) -> Weights:
    """torchvision's Swin keys renamed to timm's, which are ours; `export.py` has the inverse.

    torchvision's index buffers, which timm computes, are left out.
    """
    renamed = {}
    for name, value in weights.items():
        if name.endswith("relative_position_index"):
            continue
        name = name.replace("features.0.0.", "patch_embed.proj.")
        name = name.replace("features.0.2.", "patch_embed.norm.")
        if match := re.match(r"features\.(\d)\.", name):
            place, rest = int(match[1]), name[match.end() :]
            is_stage = place % 2 == 1
            own = f"layers.{place // 2}."
            name = own + ("blocks." if is_stage else "downsample.") + rest
        renamed[name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = value
    return renamed


def without_classifier(weights: Weights, net: nn.Module) -> Weights:
    """The weights without what only the classifier of `net` has.

    A classifier shares its place with parts of the backbone: ConvNeXt's last norm is `head.norm`.
    """
    own = net.state_dict()
    places = {name.partition(".")[0] for name in CLASSIFIERS | classifier_names(net)}
    return {
        key: value
        for key, value in weights.items()
        if key in own or key.partition(".")[0] not in places
    }


def read_weights(
    path: str | Path, setting: str = "model.weights", net: nn.Module | None = None
) -> Weights:
    """A file of timm or torchvision, safetensors or torch's own, under our names; all of it.

    Also an exported folder, or one of the hub by its name hf-hub:USER/NAME. Files of `torch.save`
    are read without running code from them. Errors name the `setting` that gave the path. A `net`
    that is given must have the stem that an exported file tells of.

    Raises:
        UserError: there is no such file, or it holds no weights, or those of another stem.
    """
    given = str(path)
    path = fetch(given, WEIGHTS_FILE) if given.startswith(HUB) else Path(path)
    if (path / WEIGHTS_FILE).is_file():  # a folder that was exported
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{setting}={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, ImportError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{setting}={path} does not hold weights: {first}") from None
    except Exception as error:  # pickle's own errors share no base class
        raise UserError(
            f"{setting}={path} does not hold plain weights: {type(error).__name__}"
        ) from None
    if net is not None and path.suffix == ".safetensors":
        require_same_stem(net, path)
    for key in ("state_dict", "model"):  # as training programs of both libraries save them
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{setting}={path} does not hold a mapping of names to weights")
    for wrapper in ("module.", "backbone."):  # DistributedDataParallel's, and that of our hub nets
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
    if "features.0.0.weight" in weights and any("relative_position" in name for name in weights):
        weights = from_torchvision_swin(weights)
    return weights


def stem_facts(net: nn.Module) -> dict[str, str]:
    """What shapes do not tell of a ResNet and a file of its weights should: the first stride."""
    return {"stem_stride": str(net.conv1.stride[0])} if isinstance(net, ResNet) else {}


def require_same_stem(net: nn.Module, file: Path) -> None:
    """Compares a backbone with what a safetensors file tells of its own.

    Raises:
        UserError: the file's has another first stride.
    """
    with safe_open(file, "pt") as opened:
        kept = opened.metadata() or {}
    for key, value in stem_facts(net).items():
        if kept.get(key, value) != value:
            raise UserError(
                f"{file} holds another net: its first stride is {kept[key]}, not {value}; change "
                "small_images"
            )


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Puts a file's weights into a backbone, in place; the file's classifier is left out.

    Raises:
        UserError: the file cannot be read, or holds another net; the first difference is named.
    """
    set_weights(net, read_weights(path, net=net), path)


def set_weights(net: nn.Module, read: Weights, path: str | Path) -> None:
    """Puts what was read of a file into a backbone, in place; as `load_weights`."""
    weights = with_resized_positions(net, without_classifier(read, net))
    own = net.state_dict()
    # Counters are no weights; torchvision's oldest files lack them.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    missing, unexpected = sorted(needed - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if missing or unexpected or shapes:
        first = (
            f"{shapes[0]} is {tuple(weights[shapes[0]].shape)}, not {tuple(own[shapes[0]].shape)}"
            if shapes
            else f"{missing[0]} is missing"
            if missing
            else f"{unexpected[0]} is not part of it"
        )
        raise UserError(f"model.weights={path} is another net than model.backbone: {first}")
    net.load_state_dict(weights, strict=False)
