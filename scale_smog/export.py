"""A trained net for timm, torchvision, Hugging Face and ONNX: keys renamed, a card."""

import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from scale_smog.checkpoint.nets import find_checkpoint, load_net, read_part
from scale_smog.checkpoint.start_from import PARTS
from scale_smog.config import ModelConfig, NetName, Recipe
from scale_smog.data.augment import MEAN, STD
from scale_smog.errors import UserError
from scale_smog.methods import METHODS
from scale_smog.models.backbones import ENTRY_POINTS
from scale_smog.models.hub import STATE_FILE, WEIGHTS_FILE, save_for_hub
from scale_smog.models.timm_nets import save_for_timm
from scale_smog.models.weights import stem_facts
from scale_smog.recipe import load_recipe
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import write_atomically
from scale_smog.runtime.stores import shown

FORMATS = ("timm", "torchvision", "hf", "onnx")
ONNX_FILE = "model.onnx"
# Names of our nets elsewhere. A ResNet of another width or stem has none: its stem differs too.
TIMM = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
TORCHVISION = {"resnet18": "resnet18", "resnet50": "resnet50", "swin_tiny": "swin_t"}
OURS = ("resnet_tiny", "resnet18", "resnet50", "swin_tiny")
SWIN_BUFFER = "relative_position_index"
# timm's Swin keys, ours too, with torchvision's place; stages and mergings alternate there.
_SWIN_BLOCK = re.compile(r"layers\.(\d)\.blocks\.(\d+)\.")
_SWIN_MERGING = re.compile(r"layers\.(\d)\.downsample\.")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: holds model.safetensors and README.md.
        architecture: the library's name of the net, or "" where it has none.
        usage: lines of Python that load it.
        num_features: of its output.
    """

    folder: Path
    architecture: str
    usage: str
    num_features: int


def export(
    path: str, out: str, kind: str, with_state: bool = False, net: NetName = "online"
) -> Exported:
    """Writes the backbone of a checkpoint for another library.

    Args:
        path: a run (its newest checkpoint) or one of its checkpoints.
        out: folder to write: `model.safetensors` and `README.md`; for "hf" `config.json` too, for
            "onnx" `model.onnx` instead.
        kind: "timm", "torchvision", "hf" (a folder for the hub, that timm loads) or "onnx".
        with_state: also write heads, momentum net and groups, under the checkpoint's own names.
        net: whose backbone.

    Raises:
        UserError: no whole checkpoint, the library has no such net, or `out` cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format '{kind}': {', '.join(FORMATS)}")
    if with_state and net == "momentum":
        raise UserError("--full goes with --net online: a run that begins with it takes that net")
    folder, run_dir = find_checkpoint(Path(path))
    recipe = load_recipe(run_dir / run_layout.RECIPE_FILE)
    backbone = load_net(folder, recipe.model, recipe.nets, net).backbone
    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    architecture = _architecture(recipe.model, kind)
    if kind == "torchvision" and recipe.model.backbone == "swin_tiny":
        weights = to_torchvision_swin(weights) | _swin_buffers()
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    target = Path(os.path.abspath(out))  # "." has a name too
    usage = _usage(recipe, kind, architecture, target.name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS_FILE, ONNX_FILE, STATE_FILE):  # of an export before
            (target / name).unlink(missing_ok=True)
        if kind == "hf":
            _write_for_hub(target, weights, architecture, recipe, net)
        elif kind == "onnx":
            _write_onnx(target / ONNX_FILE, backbone, recipe.evaluation.image_px)
        else:
            metadata = {"format": "pt"} | stem_facts(backbone)
            save_file(weights, target / WEIGHTS_FILE, metadata=metadata)
        if with_state:
            metadata = {"format": "pt"} | stem_facts(backbone)
            save_file(_state(folder), target / STATE_FILE, metadata=metadata)
        name = f"{run_dir.name}, {folder.name}, {net} net"
        library = "timm" if architecture else "scale_smog"
        card = _card(recipe, name, num_features, usage, kind, library)
        write_atomically(target / "README.md", card.encode())
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {words}") from None
    return Exported(target, architecture, usage, num_features)


def _architecture(model: ModelConfig, kind: str) -> str:
    """The library's name of this net; "" where it has none.

    Raises:
        UserError: torchvision has no nets but some of ours.
    """
    if model.backbone not in OURS:
        if kind == "torchvision":
            raise UserError(f"torchvision has no {model.backbone}: take --format timm")
        # Nets of installed packages come before timm's of that name, and timm cannot make them.
        is_offered = model.backbone in entry_points(group=ENTRY_POINTS).names
        return "" if is_offered else model.backbone
    names = TORCHVISION if kind == "torchvision" else TIMM
    is_plain = model.width == 1 and not model.small_images
    return names.get(model.backbone, "") if is_plain else ""


def _usage(recipe: Recipe, kind: str, architecture: str, folder: str) -> str:
    """Python that loads the folder."""
    model, px = recipe.model, recipe.evaluation.image_px
    if kind == "onnx":
        return (
            f'import onnxruntime\nnet = onnxruntime.InferenceSession("{folder}/{ONNX_FILE}")\n'
            f'(features,) = net.run(None, {{"images": images}})  # [B, 3, {px}, {px}] float32'
        )
    if kind == "hf" and not architecture:
        return (
            f'from scale_smog.models.hub import hub_net\nnet = hub_net("{folder}")\n'
            f'# once uploaded: hub_net("USER/{folder}")'
        )
    read = "from safetensors.torch import load_file\n"
    load = f'net.load_state_dict(load_file("{folder}/{WEIGHTS_FILE}"))\nnet.eval()'
    if kind == "torchvision" and architecture:
        classifier = "head" if architecture.startswith("swin") else "fc"
        return (
            f"import torch, torchvision\n{read}net = torchvision.models.{architecture}()\n"
            f"net.{classifier} = torch.nn.Identity()\n{load}"
        )
    if kind == "hf" and architecture:
        return (
            f'import timm\nnet = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
            f'# once uploaded: timm.create_model("hf-hub:USER/{folder}", pretrained=True).eval()'
        )
    if architecture:
        return (
            f'import timm\n{read}net = timm.create_model("{architecture}", num_classes=0)\n{load}'
        )
    # Neither library has this net, stem or width.
    arguments = f'"{model.backbone}", width={model.width}, small_images={model.small_images}'
    make = f"from scale_smog.models import build_backbone\n{read}net = build_backbone({arguments})"
    return f"{make}\n{load}"


def to_torchvision_swin(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swin's keys renamed to torchvision's; `models/weights.py` has the inverse."""
    renamed = {}
    for key, value in weights.items():
        key = _SWIN_BLOCK.sub(lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.", key)
        key = _SWIN_MERGING.sub(lambda m: f"features.{2 * int(m[1])}.", key)
        key = key.replace("patch_embed.proj.", "features.0.0.")
        key = key.replace("patch_embed.norm.", "features.0.2.")
        renamed[key.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")] = value
    return renamed


def _swin_buffers() -> dict[str, Tensor]:
    """Index tables that torchvision keeps among the weights; they depend on the window only."""
    import torchvision

    own = torchvision.models.swin_t().state_dict()
    return {name: value for name, value in own.items() if name.endswith(SWIN_BUFFER)}


def _state(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.contiguous()
        for part in PARTS
        for name, value in read_part(folder, part).items()
    }


def _write_for_hub(
    folder: Path, weights: dict[str, Tensor], architecture: str, recipe: Recipe, net: NetName
) -> None:
    """What timm loads by its name; of a net that timm does not have, what `hub_net` loads."""
    model, px = recipe.model, recipe.evaluation.image_px
    if not architecture:
        save_for_hub(folder, weights, model.backbone, model.width, model.small_images)
        return
    preprocessing = {
        "input_size": (3, px, px),
        "interpolation": "bicubic",
        "crop_pct": recipe.evaluation.crop_share,
        "mean": [round(value / 255, 6) for value in MEAN.tolist()],
        "std": [round(value / 255, 6) for value in STD.tolist()],
    }
    about = {"scale_smog": {**model.model_dump(), "net": net, "method": recipe.method.name}}
    save_for_timm(folder, architecture, weights, preprocessing, about)


def _write_onnx(path: Path, backbone: nn.Module, px: int) -> None:
    """Images [B, 3, px, px] float32 to features [B, F], for any B.

    Raises:
        UserError: the exporter's packages are missing.
    """
    try:
        import_module("onnxscript")
    except ImportError:
        raise UserError("--format onnx needs more: pip install 'scale_smog[onnx]'") from None
    images = torch.zeros(2, 3, px, px)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        backbone.eval(),
        (images,),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )


def _numbers(pixel_values: np.ndarray) -> str:
    return ", ".join(f"{value / 255:.3f}" for value in pixel_values.tolist())


def _card(recipe: Recipe, name: str, num_features: int, usage: str, kind: str, library: str) -> str:
    """The model card: what it is, how to load it, how it was trained."""
    model, method, data = recipe.model, recipe.method, recipe.data
    run, start = recipe.run, shown(recipe.start)
    length = f"{run.epochs:g} epochs" if run.epochs else f"{run.steps} steps"
    groups = f"| groups | {recipe.grouping.num_groups} |\n" if method.has_groups else ""
    head = (
        f"---\nlibrary_name: {library}\n"
        f"tags: [image-feature-extraction, {library}, {method.name}]\n---\n\n"
    )
    return (
        (head if kind == "hf" else "")
        + f"""# {model.backbone}, trained {"further " if start else ""}without labels

The backbone of {name}: images [B, 3, H, W] to features [B, {num_features}]. It has no
classifier. Trained with scale_smog by {METHODS[method.name].title}.

```python
{usage}
```

It was evaluated on {recipe.evaluation.crop_share:g} of the shorter side, a centre square that was
resized to {recipe.evaluation.image_px} px (bicubic), RGB from 0 to 1, less the mean and divided by
the deviation of ImageNet: ({_numbers(MEAN)}) and ({_numbers(STD)}).

| setting | value |
|---|---|
| width, stem | {model.width}, {"3x3 for small images" if model.small_images else "as published"} |
| began with | {start or "random weights"} |
{groups}| batch | {data.global_batch} |
| length of the run | {length} |
| views | two of {data.large_px} px, {data.num_small_crops} of {data.small_px} px |
| optimizer | {recipe.optimizer.name}, base rate {recipe.optimizer.base_lr:g} |

`training_state.safetensors`, where it is there, holds the online and the momentum net with their
heads, and the groups.
"""
    )
