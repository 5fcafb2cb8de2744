"""All that a run is, besides its recipe: nets, optimizer, groups, bank, usage and the step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import ModelConfig, Recipe
from scale_smog.data.batch import Batch
from scale_smog.distributed import Partition
from scale_smog.engine import Engine, build_engine
from scale_smog.grouping import FeatureBank, GroupUsage, MomentumGroups
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    build_nets,
    frozen_running_stats,
    process_group_for,
    synchronise_batch_norm,
)
from scale_smog.models.check import batch_norm_images, image_sizes, require_images_fit
from scale_smog.models.weights import load_weights
from scale_smog.runtime import phases


@dataclass
class TrainState:
    """What a checkpoint holds; every part describes itself by partitions."""

    engine: Engine
    groups: MomentumGroups
    bank: FeatureBank
    usage: GroupUsage
    step: int = 0  # finished steps

    def state_dict(self) -> dict[str, Partition]:
        """What this rank holds of it, under names that know no engine and no number of ranks."""
        groups = {name: Partition.replicated(x) for name, x in self.groups.state_dict().items()}
        parts = {"groups": groups, "bank": self.bank.state_dict(), "usage": self.usage.state_dict()}
        state = self.engine.state_dict()
        for prefix, part in parts.items():
            state |= {f"{prefix}.{name}": partition for name, partition in part.items()}
        return state

    def load_state_dict(self, values: dict[str, Tensor], step: int) -> None:
        """Takes this rank's values of `state_dict`, as they were after `step` steps."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

        self.engine.load_state_dict(values)
        self.groups.load_state_dict(part("groups."))
        self.bank.load_state_dict(part("bank."))
        self.usage.load_state_dict(part("usage."))
        self.step = step


def build_state(recipe: Recipe, batch: int, device: torch.device) -> TrainState:
    """The state of a run that has not begun; the same on all ranks.

    Args:
        recipe: of the run.
        batch: images of a rank at a step, B.
        device: of this rank.

    Raises:
        UserError: the nets do not take the images, or a file of first weights does not fit.
    """
    model, grouping = recipe.model, recipe.grouping
    world_size, ranks_per_node = distributed.world_size(), distributed.ranks_per_node()
    micro_batch = batch // recipe.engine.accumulate
    norm_batch = batch_norm_images(model, micro_batch, world_size, ranks_per_node)
    require_images_fit(model, image_sizes(recipe.data, recipe.evaluation), norm_batch)
    torch.manual_seed(recipe.run.seed)
    online, momentum = build_initial_nets(model)
    for net in (online, momentum):  # a group each: they may be passed at the same time
        scope = process_group_for(model.batch_norm, ranks_per_node)
        synchronise_batch_norm(net.to(device), scope, is_even=True)
    engine = build_engine(online, momentum, recipe.optimizer, recipe.engine, batch)
    groups = MomentumGroups.from_config(grouping, model.dim, recipe.run.seed)
    return TrainState(
        engine=engine,
        groups=groups.to(device, engine.dtype),
        bank=FeatureBank(recipe.bank_steps, batch, model.dim, device),
        usage=GroupUsage(grouping.num_groups, device),
    )


def build_initial_nets(model: ModelConfig) -> tuple[OnlineNet, MomentumNet]:
    """The nets as training begins: with random weights, or a file's in their backbones."""
    nets = build_nets(model)
    if model.weights:
        for net in nets:
            load_weights(net.backbone, model.weights)
    return nets


@torch.no_grad()
def init_groups(state: TrainState, batches: Iterable[Batch]) -> None:
    """First groups: k-means over features of the initial net (SMoG section 4.1).

    Raises:
        StopRequested: on all ranks alike; the nets are as they were.
    """
    embed = stoppable(lambda view: state.engine.forward_online(view, [])[0])
    with frozen_running_stats(state.engine.online):
        z = [embed(batch.large[0]) for batch in batches]  # [B, D] each
    bank = FeatureBank(len(z), len(z[0]), z[0].shape[1], z[0].device)
    for features in z:
        bank.push(features)
    state.groups.start_from(bank)


def stoppable(embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`embed`, which a stop request ends between two batches, on all ranks alike."""

    def embed_or_stop(images: Tensor) -> Tensor:
        phases.check_for_stop()
        return embed(images)

    return embed_or_stop
