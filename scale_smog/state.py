"""All that a run is, besides its recipe: nets and optimizer, what its method keeps, the step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import ModelConfig, NetPlan, Recipe
from scale_smog.distributed import Partition
from scale_smog.engine import Engine, build_engine
from scale_smog.methods import Method, build_method
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    build_nets,
    process_group_for,
    synchronise_batch_norm,
)
from scale_smog.models.check import batch_norm_images, image_sizes, require_images_fit
from scale_smog.models.weights import read_weights, set_weights


@dataclass
class TrainState:
    """What a checkpoint holds; every part describes itself by partitions."""

    engine: Engine
    method: Method
    step: int = 0  # finished steps

    def state_dict(self) -> dict[str, Partition]:
        """What this rank holds of it, under names that know no engine and no number of ranks."""
        return self.engine.state_dict() | self.method.state_dict()

    def load_state_dict(self, values: dict[str, Tensor], step: int) -> None:
        """Takes this rank's values of `state_dict`, as they were after `step` steps."""
        self.engine.load_state_dict(values)
        self.method.load_state_dict(values)
        self.step = step


def build_state(
    recipe: Recipe, batch: int, device: torch.device, num_images: int | None = None
) -> TrainState:
    """The state of a run that has not begun; the same on all ranks.

    Args:
        recipe: of the run.
        batch: images of a rank at a step, B.
        device: of this rank.
        num_images: of the training split; what the recipe expects if it is not given.

    Raises:
        UserError: the nets do not take the images, or a file of first weights does not fit.
    """
    model = recipe.model
    world_size, ranks_per_node = distributed.world_size(), distributed.ranks_per_node()
    micro_batch = batch // recipe.engine.accumulate
    norm_batch = batch_norm_images(model, micro_batch, world_size, ranks_per_node)
    require_images_fit(model, image_sizes(recipe.data, recipe.evaluation), norm_batch)
    torch.manual_seed(recipe.run.seed)
    online, momentum = build_initial_nets(model, recipe.nets)
    for net in (online, momentum):  # a group each: they may be passed at the same time
        scope = process_group_for(model.batch_norm, ranks_per_node)
        synchronise_batch_norm(net.to(device), scope, is_even=True)
    seed = recipe.run.seed
    engine = build_engine(online, momentum, recipe.optimizer, recipe.engine, batch, seed)
    method = build_method(recipe, engine, batch, num_images or recipe.data.num_images)
    return TrainState(engine, method)


def build_initial_nets(model: ModelConfig, plan: NetPlan) -> tuple[OnlineNet, MomentumNet]:
    """The nets as training begins: with random weights, or a file's in their backbones.

    A collective: rank 0 reads or fetches the file.
    """
    nets = build_nets(model, plan)
    if model.weights:
        weights = distributed.call_on_main(
            lambda: read_weights(model.weights, net=nets[0].backbone)
        )
        for net in nets[: 2 if plan.num_momentum_views else 1]:
            set_weights(net.backbone, weights, model.weights)
    return nets
