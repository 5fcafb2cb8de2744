"""What one rank will hold and send at a recipe's step, counted without allocating it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scale_smog.config import ZERO_BUCKET_NUMEL, EngineConfig, Recipe
from scale_smog.models import MomentumNet, OnlineNet, build_nets, stages
from scale_smog.models.check import batch_norm_images, image_sizes, require_images_fit
from scale_smog.optim import STATE_KEYS
from scale_smog.profiling.sharding import Shards, shards_of

MIB = 2**20
ZERO3_LIVE = 1e9  # weights that DeepSpeed keeps gathered by default


@dataclass(frozen=True)
class MemoryPlan:
    """Parameters, and MiB of one rank at the peak of a step."""

    num_backbone_parameters: int
    num_online_parameters: int
    weights_and_gradients_mib: float
    momentum_net_mib: float
    optimizer_mib: float
    activations_mib: float
    groups_and_bank_mib: float

    @property
    def total_mib(self) -> float:
        """Sum of the parts; temporary buffers of the libraries come on top."""
        return (
            self.weights_and_gradients_mib
            + self.momentum_net_mib
            + self.optimizer_mib
            + self.activations_mib
            + self.groups_and_bank_mib
        )


def plan_memory(recipe: Recipe, world_size: int, ranks_per_node: int = 8) -> MemoryPlan:
    """Counts what a rank of `world_size` holds; hsdp splits over `ranks_per_node`.

    Raises:
        UserError: the nets do not take the images.
    """
    model, data, engine = recipe.model, recipe.data, recipe.engine
    micro_batch = data.global_batch // world_size // engine.accumulate
    norm_batch = batch_norm_images(model, micro_batch, world_size, ranks_per_node)
    require_images_fit(model, image_sizes(data, recipe.evaluation), norm_batch)
    online, momentum = _nets_without_values(recipe)
    value_bytes = 8 if engine.precision == "fp64" else 4
    num_online, num_momentum = _numel(online), _numel(momentum)
    shards = shards_of(engine.kind, world_size, ranks_per_node)
    batch = data.global_batch // world_size
    weights = _weights_and_gradients(engine, shards, online, momentum)
    activations = _activation_bytes(online, recipe, batch // engine.accumulate, shards)
    if engine.precision == "bf16" and not engine.activation_checkpointing:
        activations += 2 * num_online  # autocast's copies of the weights, for the pass back
    if engine.kind == "zero1":  # its gradients come while activations go: they share the room
        activations = max(activations, num_online * value_bytes)
    states = len(STATE_KEYS[recipe.optimizer.name]) * num_online / shards.optimizer
    bank = recipe.num_kept_features(batch) * model.dim * 4
    groups = 3 * recipe.grouping.num_groups * (model.dim + 1) * value_bytes
    return MemoryPlan(
        num_backbone_parameters=_numel(online.backbone),
        num_online_parameters=num_online,
        weights_and_gradients_mib=weights * value_bytes / MIB,
        momentum_net_mib=num_momentum / shards.weights * value_bytes / MIB,
        optimizer_mib=states * value_bytes / MIB,
        activations_mib=activations / MIB,
        groups_and_bank_mib=(bank + groups) / MIB,
    )


def _weights_and_gradients(
    engine: EngineConfig, shards: Shards, online: OnlineNet, momentum: MomentumNet
) -> float:
    """Values that a rank holds of them at the peak, master values and buffers among them."""
    num_online, num_momentum, kind = _numel(online), _numel(momentum), engine.kind
    values = num_online / shards.weights
    if kind != "zero1":
        values += num_online / shards.gradients
    if kind.startswith("zero"):  # masters apart from what the nets compute with, and a bucket
        values += num_online / shards.optimizer + ZERO_BUCKET_NUMEL
    if kind == "zero3":  # both nets gathered, and a stage once more while it is on its way
        gathered = min(num_online, ZERO3_LIVE) + min(num_momentum, ZERO3_LIVE)
        return values + gathered + _largest_stage(online)
    if kind in ("fsdp", "hsdp") and engine.accumulate > 1:  # whole until the last micro-batch
        values += num_online
    return values


def _bytes_of_a_live_weight(engine: EngineConfig, shards: Shards) -> float:
    """That a weight of the computing stage takes besides: a copy, gathered values, gradients."""
    num_bytes = 0.0
    if engine.precision == "bf16":
        if engine.activation_checkpointing:
            num_bytes += 2  # autocast's copy; without checkpointing those of all stages are held
        if shards.weights == 1 and not engine.compile:  # a stage's gradients wait for one another
            num_bytes += 2
    if shards.weights > 1 and engine.kind != "zero3":  # gathered, and its gradient
        num_bytes += 2 * (8 if engine.precision == "fp64" else 4)
    return num_bytes


def _largest_stage(online: OnlineNet) -> int:
    return max(_numel(stage) for stage in stages(online.backbone))


def _nets_without_values(recipe: Recipe) -> tuple[OnlineNet, MomentumNet]:
    with torch.device("meta"), _NothingDrawn():
        return build_nets(recipe.model, recipe.nets)


class _NothingDrawn(TorchFunctionMode):
    """Leaves random weights out: to draw none on the meta device, torch imports its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activation_bytes(online: OnlineNet, recipe: Recipe, batch: int, shards: Shards) -> float:
    """Bytes that the online net's forward pass keeps for backward, and those of a live stage.

    Counted for 2 images, and scaled.
    """
    data, num_images = recipe.data, 2
    saved = _SavedTensors(online)
    large = torch.empty(num_images, 3, data.large_px, data.large_px, device="meta")
    small = torch.empty(num_images, 3, data.small_px, data.small_px, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda x: x):
        others = [large] * (recipe.nets.num_online_views - 1) + [small] * data.num_small_crops
        online(large, others)
    value_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[recipe.engine.precision]
    of_value = value_bytes * batch / num_images
    of_weight = _bytes_of_a_live_weight(recipe.engine, shards)
    if not recipe.engine.activation_checkpointing:
        return saved.numel() * of_value + of_weight * _largest_stage(online)
    return max(
        numel * of_value + of_weight * _numel(stage) for stage, numel in saved.numel_of_stages()
    )


class _SavedTensors:
    """What a forward pass saves, outside the stages of the backbone and in each pass through one.

    Args:
        online: whose passes to note.
    """

    def __init__(self, online: OnlineNet):
        self._outside: dict[int, Tensor] = {}  # a tensor saved by two operations is held once
        self._passes: list[tuple[torch.nn.Module, dict[int, Tensor]]] = []
        self._inputs: dict[int, Tensor] = {}
        self._current = self._outside
        for stage in stages(online.backbone):
            stage.register_forward_pre_hook(self._enter)
            stage.register_forward_hook(self._leave)

    def note(self, x: Tensor) -> Tensor:
        """Of `saved_tensors_hooks`."""
        if not isinstance(x, torch.nn.Parameter):
            self._current[id(x)] = x
        return x

    def numel(self) -> int:
        """Values held at the end of the forward pass."""
        return _count([self._outside, *(own for _, own in self._passes)])

    def numel_of_stages(self) -> list[tuple[torch.nn.Module, int]]:
        """Of checkpointed stages, which keep their inputs: values held while one is repeated."""
        return [(stage, _count([self._outside, self._inputs, own])) for stage, own in self._passes]

    def _enter(self, stage: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs[id(inputs[0])] = inputs[0]
        self._current = {}
        self._passes.append((stage, self._current))

    def _leave(self, *_: object) -> None:
        self._current = self._outside


def _count(saved: Sequence[dict[int, Tensor]]) -> int:
    """Values that are held: tensors may be views of the same memory."""
    tensors = [x for each in saved for x in each.values()]
    held = {x.untyped_storage()._cdata: x for x in tensors}
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in held.values())
