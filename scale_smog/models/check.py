"""Whether a net takes its images, found out on the meta device before anything is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_smog.config import DataConfig, EvaluationConfig, ModelConfig
from scale_smog.errors import UserError
from scale_smog.models.drop_path import dropped
from scale_smog.models.siamese import build_nets
from scale_smog.models.timm_nets import own_size_px


def image_sizes(data: DataConfig, evaluation: EvaluationConfig) -> dict[str, int]:
    """Side in pixels of all that passes through the nets of a run, by the key that sets it."""
    small = {"data.small_px": data.small_px} if data.num_small_crops else {}
    return {"data.large_px": data.large_px, **small, "evaluation.image_px": evaluation.image_px}


def batch_norm_images(model: ModelConfig, batch: int, world_size: int, ranks_per_node: int) -> int:
    """Images over which a batch norm takes its statistics.

    Args:
        model: how many ranks share statistics.
        batch: images of a forward pass of a rank.
        world_size: all ranks.
        ranks_per_node: of a host.
    """
    of_node = min(ranks_per_node, world_size)
    scopes: dict[str | int, int] = {"global": world_size, "node": of_node, "local": 1}
    return batch * int(scopes.get(model.batch_norm, model.batch_norm))


def require_images_fit(model: ModelConfig, sizes_px: Mapping[str, int], batch: int) -> None:
    """Raises a UserError unless backbone and heads can be trained on images of these sizes.

    Args:
        model: the nets.
        sizes_px: sides of square images, by the key that sets them; those of `data` are trained on.
        batch: images that a batch norm sees at once.
    """
    trained: set[int] = set()  # ids of the weights that a gradient reaches
    with torch.device("meta"):
        online, _ = build_nets(model)
    _require_untied(online.backbone, model.backbone)
    keys: dict[int, str] = {}  # by size; of those alike the first
    for key, px in sizes_px.items():
        keys.setdefault(px, key)
    for px, key in keys.items():
        random = _RandomOperators()
        try:
            with torch.device("meta"), random:
                factors = [torch.empty(batch)] * len(online.drop_paths)
                with dropped(online.drop_paths, factors):
                    features = online.backbone.train()(torch.empty(batch, 3, px, px))
                _require_features(features, online.backbone, model.backbone)
                online.predictor(online.projector(features))
        except UserError:
            raise
        except Exception as error:  # each of a thousand nets has errors of its own
            raise UserError(_refusal(model, online.backbone, key, px, batch, error)) from None
        if key.startswith("data."):
            trained |= _weights_behind(features)
        if random.names:
            raise UserError(
                f"model.backbone={model.backbone} draws random numbers in training "
                f"({', '.join(sorted(random.names))}), so that no step could be repeated: take "
                "another backbone"
            )
    if trained:
        _require_gradients(online.backbone, model.backbone, trained)


def _require_untied(backbone: nn.Module, name: str) -> None:
    once = {key for key, _ in backbone.named_parameters()}
    again = [key for key, _ in backbone.named_parameters(remove_duplicate=False) if key not in once]
    if again:
        raise UserError(
            f"model.backbone={name} uses weights in several places, such as {again[0]}, and "
            "checkpoints keep weights once: take another backbone"
        )


def _require_features(features: Any, backbone: nn.Module, name: str) -> None:
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(shape, tuple) or shape[1:] != (backbone.num_features,):
        raise UserError(
            f"model.backbone={name} makes no features [B, {backbone.num_features}] of images: its "
            f"output is {shape}; take another backbone"
        )


def _weights_behind(features: Tensor) -> set[int]:
    """Ids of the weights that features depend on."""
    found, nodes, weights = set(), [features.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            weights.add(id(getattr(node, "variable", None)))
            nodes += [before for before, _ in node.next_functions]
    return weights


def _require_gradients(backbone: nn.Module, name: str, trained: set[int]) -> None:
    """DDP waits for a gradient of every weight, and FSDP's update needs one."""
    for key, weight in backbone.named_parameters():
        if weight.requires_grad and id(weight) not in trained:
            raise UserError(
                f"model.backbone={name} has weights that its features do not depend on, such as "
                f"{key}, and engines wait for their gradients: take another backbone"
            )


def _refusal(
    model: ModelConfig, backbone: nn.Module, key: str, px: int, batch: int, error: Exception
) -> str:
    words = (str(error).splitlines() or [""])[0] or type(error).__name__
    if "more than 1 value per channel" in words:
        return (
            f"batch norm sees {batch} image at a time and needs two: raise data.global_batch, or "
            "have fewer ranks or engine.accumulate micro-batches"
        )
    return (
        f"model.backbone={model.backbone} does not take images of {key}={px} ({words}): its own "
        f"size is {own_size_px(backbone)} px; give another {key} or another backbone"
    )


class _RandomOperators(TorchDispatchMode):
    """Notes the operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
