"""What one rank will hold and send at a recipe's step, counted without allocating it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scale_smog.config import EngineConfig, Recipe
from scale_smog.models import MomentumNet, OnlineNet, build_nets, stages
from scale_smog.models.check import batch_norm_images, image_sizes, require_images_fit

MIB = 2**20
ZERO3_LIVE = 1e9  # weights that DeepSpeed keeps gathered by default
REDUCE_BUCKET_NUMEL = 50_000_000  # that the ZeRO engines ask DeepSpeed for; it allocates it whole
STATES = {"lars": 1, "sgd": 1, "adamw": 2}  # optimizer values a parameter


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
    parts = _parts(engine.kind, world_size, ranks_per_node)
    batch = data.global_batch // world_size
    weights = _weights_and_gradients(engine, parts, online, momentum)
    activations = _activation_bytes(online, recipe, batch // engine.accumulate, parts)
    if engine.precision == "bf16" and not engine.activation_checkpointing:
        activations += 2 * num_online  # autocast's copies of the weights, for the pass back
    if engine.kind == "zero1":  # its gradients come while activations go: they share the room
        activations = max(activations, num_online * value_bytes)
    states = STATES[recipe.optimizer.name] * num_online / parts.optimizer
    bank = recipe.num_kept_features(batch) * model.dim * 4
    groups = 3 * recipe.grouping.num_groups * (model.dim + 1) * value_bytes
    return MemoryPlan(
        num_backbone_parameters=_numel(online.backbone),
        num_online_parameters=num_online,
        weights_and_gradients_mib=weights * value_bytes / MIB,
        momentum_net_mib=num_momentum / parts.weights * value_bytes / MIB,
        optimizer_mib=states * value_bytes / MIB,
        activations_mib=activations / MIB,
        groups_and_bank_mib=(bank + groups) / MIB,
    )


def _weights_and_gradients(
    engine: EngineConfig, parts: "_Parts", online: OnlineNet, momentum: MomentumNet
) -> float:
    """Values that a rank holds of them at the peak, master values and buffers among them."""
    num_online, num_momentum, kind = _numel(online), _numel(momentum), engine.kind
    values = num_online / parts.weights
    if kind != "zero1":
        values += num_online / parts.gradients
    if kind.startswith("zero"):  # masters apart from what the nets compute with, and a bucket
        values += num_online / parts.optimizer + REDUCE_BUCKET_NUMEL
    if kind == "zero3":  # both nets gathered, and a stage once more while it is on its way
        gathered = min(num_online, ZERO3_LIVE) + min(num_momentum, ZERO3_LIVE)
        return values + gathered + _largest_stage(online)
    if kind in ("fsdp", "hsdp") and engine.accumulate > 1:  # whole until the last micro-batch
        values += num_online
    return values


def _bytes_of_a_live_weight(engine: EngineConfig, parts: "_Parts") -> float:
    """That a weight of the computing stage takes besides: a copy, gathered values, gradients."""
    num_bytes = 0.0
    if engine.precision == "bf16":
        if engine.activation_checkpointing:
            num_bytes += 2  # autocast's copy; without checkpointing those of all stages are held
        if parts.weights == 1 and not engine.compile:  # a stage's gradients wait for one another
            num_bytes += 2
    if parts.weights > 1 and engine.kind != "zero3":  # gathered, and its gradient
        num_bytes += 2 * (8 if engine.precision == "fp64" else 4)
    return num_bytes


def _largest_stage(online: OnlineNet) -> int:
    return max(_numel(stage) for stage in stages(online.backbone))


def sent_mib(recipe: Recipe, world_size: int, ranks_per_node: int = 8) -> float:
    """MiB that a rank sends at a step for weights and gradients, by the ring algorithms.

    A ring all-reduce of n bytes among r ranks sends 2 n (r - 1) / r from each, an all-gather or a
    reduce-scatter half of it (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """
    online, momentum = _nets_without_values(recipe)
    num_online, num_momentum = _numel(online), _numel(momentum)
    kind = recipe.engine.kind
    weight_bytes = 8 if recipe.engine.precision == "fp64" else 4
    grad_bytes = 2 if recipe.engine.reduce_precision == "bf16" else weight_bytes
    if kind in ("zero2", "zero3"):  # they share the gradients of every micro-batch
        grad_bytes *= recipe.engine.accumulate
    parts = _parts(kind, world_size, ranks_per_node).weights
    once = (world_size - 1) / world_size
    if parts == 1:  # gradients are summed up and, under ZeRO, new weights sent round
        gathered = num_online * weight_bytes if kind != "ddp" else 0
        return (gathered + 2 * num_online * grad_bytes) * once / MIB
    # Weights are gathered for every forward pass, and once more for the backward pass.
    engine, nets = recipe.engine, recipe.nets
    num_sizes = nets.num_online_views + (1 if recipe.data.num_small_crops else 0)
    num_passes = (engine.num_online_forwards + 1) * num_sizes
    num_values = num_passes * num_online + nets.num_momentum_views * num_momentum
    gathered = engine.accumulate * num_values * weight_bytes
    sent = (gathered + num_online * grad_bytes) * (parts - 1) / parts
    copies = world_size / parts  # hsdp: the nodes' copies add up their parts of the gradients
    sent += 2 * num_online / parts * grad_bytes * (copies - 1) / copies
    return sent / MIB


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


class _Parts(NamedTuple):
    """Over how many ranks each kind of tensor is split."""

    optimizer: int
    gradients: int
    weights: int


def _parts(kind: str, world_size: int, ranks_per_node: int) -> _Parts:
    per_node = min(ranks_per_node, world_size)
    return {
        "ddp": _Parts(1, 1, 1),
        "zero1": _Parts(world_size, 1, 1),
        "zero2": _Parts(world_size, world_size, 1),
        "zero3": _Parts(world_size, world_size, world_size),
        "fsdp": _Parts(world_size, world_size, world_size),
        "hsdp": _Parts(per_node, per_node, per_node),
    }[kind]


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activation_bytes(online: OnlineNet, recipe: Recipe, batch: int, parts: "_Parts") -> float:
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
    of_weight = _bytes_of_a_live_weight(recipe.engine, parts)
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
