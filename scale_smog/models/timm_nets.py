"""timm's nets, Swin-T among them: no classifier, no randomness, any image size where possible."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scale_smog.errors import UserError
from scale_smog.models.drop_path import DropPath, drop_paths

# How timm's constructors are asked for images of other sizes: ViT and its kin, Swin and its kin.
ANY_SIZE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)
# Of rotary position embeddings in training, as DINOv3 has them.
COORDINATE_NOISE = ("shift_coords", "jitter_coords", "rescale_coords")


def timm_net(name: str, drop_path: float = 0.0) -> nn.Module:
    """The timm net `name`, with random weights and no classifier.

    It takes images of any size if the architecture can, else of its own size only.

    Args:
        name: of timm's.
        drop_path: largest rate of drop path, that of the last block.

    Raises:
        UserError: the net has no drop path.
    """
    net = _create_with_drop_path(name, drop_path) if drop_path else _create(name)
    # MobileNetV3 and its kin keep a layer behind the pooling: their output has another size.
    net.num_features = getattr(net, "head_hidden_size", None) or net.num_features
    return _without_randomness(net)


def save_for_timm(
    folder: Path,
    name: str,
    weights: dict[str, Tensor],
    preprocessing: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Writes weights and configuration as `timm.create_model("local-dir:FOLDER")` reads them.

    Args:
        folder: to write.
        name: of timm's net.
        weights: of it, without classifier.
        preprocessing: what timm calls a data config: input_size, mean, std, ...
        about: further entries of config.json.
    """
    import timm
    from timm.models import save_for_hf

    net = timm.create_model(name, num_classes=0)
    net.load_state_dict(weights)
    is_fixed = getattr(net, "pretrained_cfg", {}).get("fixed_input_size")
    fixed = {"input_size"} if is_fixed else set()
    config = {key: value for key, value in preprocessing.items() if key not in fixed}
    save_for_hf(net, str(folder), model_config=about, safe_serialization=True, data_config=config)


def require_timm_name(name: str, other_names: Iterable[str]) -> None:
    """Raises a UserError with the closest of timm's and `other_names` unless timm has `name`."""
    import timm  # takes seconds to import, and a ResNet never needs it

    if timm.is_model(name):
        return
    close = get_close_matches(name, [*other_names, *timm.list_models()])
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see timm.list_models()"
    raise UserError(f"unknown backbone {name!r}: {hint}")


def with_resized_positions(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights with its table of absolute positions in the size of the net's.

    A ViT trained on images of another size has another number of patches.
    """
    own, given = net.state_dict().get("pos_embed"), weights.get("pos_embed")
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if own is None or given is None or grid is None or own.shape == given.shape:
        return weights
    from timm.layers import resample_abs_pos_embed

    has_prefix = not getattr(net, "no_embed_class", False)
    num_prefix: int = getattr(net, "num_prefix_tokens", 1) if has_prefix else 0
    resized = resample_abs_pos_embed(given, list(grid), num_prefix_tokens=num_prefix)
    return weights | {"pos_embed": resized}


def classifier_names(net: nn.Module) -> set[str]:
    """Names of the modules that are a timm net's classifier; empty for other nets."""
    names = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    return {names} if isinstance(names, str) else set(names)


def replace_drop_paths(net: nn.Module) -> None:
    """Puts our drop path in the place of timm's, with the same rates."""
    from timm.layers import DropPath as TimmDropPath

    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TimmDropPath):
                setattr(parent, name, DropPath(child.drop_prob))


def _create_with_drop_path(name: str, rate: float) -> nn.Module:
    try:
        net = _create(name, drop_path_rate=rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        net = nn.Identity()
    replace_drop_paths(net)
    if not drop_paths(net):
        raise UserError(f"drop_path: {name} has none: take 0, or another backbone")
    return net


def _create(name: str, **own: Any) -> nn.Module:
    import timm

    for arguments in ANY_SIZE_ARGUMENTS:
        try:
            net = timm.create_model(name, num_classes=0, **arguments, **own)
        except TypeError as error:
            if not any(argument in str(error) for argument in arguments):
                raise
        else:
            if _is_whole_in_patches(net):
                return net
    return timm.create_model(name, num_classes=0, **own)


def _is_whole_in_patches(net: nn.Module) -> bool:
    """Whether images of the net's own size split into patches; SigLIP's 384 px by 14 do not.

    Such a net cuts off their edge, and refuses to as soon as it takes images of any size.
    """
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", 1)
    sides = patch if isinstance(patch, tuple | list) else (patch,)
    return not any(own_size_px(net) % side for side in sides)


def own_size_px(net: nn.Module) -> int:
    """Side of the images that a timm net was made for; 0 for other nets."""
    return getattr(net, "pretrained_cfg", {}).get("input_size", (0,))[-1]


def _without_randomness(net: nn.Module) -> nn.Module:
    """Turns dropout and noise off: the paper names no rates, and a step must be repeatable."""
    for module in net.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (is_dropout and name in ("p", "prob"))
            if is_rate and isinstance(value, float):  # of modules and of functional dropout
                setattr(module, name, 0.0)
            elif name in COORDINATE_NOISE:
                setattr(module, name, None)
    return net
