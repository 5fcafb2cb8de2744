"""The memory plan of a recipe: what one rank will hold, counted without allocating it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scale_smog.config import Recipe
from scale_smog.models import build_nets

MIB = 2**20
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


def plan_memory(recipe: Recipe, world_size: int) -> MemoryPlan:
    """Counts what a rank of `world_size` holds."""
    model, data = recipe.model, recipe.data
    with torch.device("meta"):
        online, momentum = build_nets(recipe.model)
    value_bytes = 8 if recipe.engine.precision == "fp64" else 4
    num_online = _numel(online)
    shares = world_size if recipe.engine.kind == "zero1" else 1
    # ZeRO-1 keeps its own master copy of the slice it updates.
    masters = num_online / shares if recipe.engine.kind == "zero1" else 0
    batch = data.global_batch // world_size
    bank = recipe.bank_steps * batch * model.dim * 4
    groups = 3 * recipe.grouping.num_groups * (model.dim + 1) * value_bytes
    return MemoryPlan(
        num_backbone_parameters=_numel(online.backbone),
        num_online_parameters=num_online,
        weights_and_gradients_mib=(2 * num_online + masters) * value_bytes / MIB,
        momentum_net_mib=_numel(momentum) * value_bytes / MIB,
        optimizer_mib=STATES[recipe.optimizer.name] * num_online * value_bytes / shares / MIB,
        activations_mib=_activation_bytes(online, recipe, batch) / MIB,
        groups_and_bank_mib=(bank + groups) / MIB,
    )


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activation_bytes(online: torch.nn.Module, recipe: Recipe, batch: int) -> float:
    """Bytes that the online net's forward pass keeps for backward: counted for 2 images, scaled."""
    data = recipe.data
    saved: dict[int, Tensor] = {}  # a tensor saved by two operations is held once

    def note(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            saved[id(x)] = x
        return x

    num_images = 2
    large = torch.empty(num_images, 3, data.large_px, data.large_px, device="meta")
    small = torch.empty(num_images, 3, data.small_px, data.small_px, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        online(large, [small] * data.num_small_crops)
    value_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[recipe.engine.precision]
    numel = sum(x.numel() for x in saved.values())
    return numel * value_bytes * batch / num_images
