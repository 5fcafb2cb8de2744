"""What a method is to the loop: a step, and what it keeps from one step to the next."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.distributed import Partition
from scale_smog.engine import Engine
from scale_smog.grouping import FeatureBank, GroupUsage, ResetReport
from scale_smog.models import frozen_running_stats
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues


class StepReport(NamedTuple):
    """What a step says of itself."""

    loss: Tensor  # [], of this rank
    is_applied: bool  # on all ranks; False: not finite, and nothing has changed
    chance_loss: float  # of a net that cannot tell its choices apart
    figures: dict[str, float] = {}  # noqa: RUF012 - more to log, such as beta; never changed
    usage: GroupUsage | None = None  # of its groups, where the step has any
    reset: ResetReport | None = None  # what k-means did to the groups, where the step began so
    bank: FeatureBank | None = None  # features of the last steps, where the method keeps them
    alignment: Tensor | None = None  # [], mean |z - z'|^2 of this rank's images


class Method(ABC):
    """One way to train the nets; the loop, engines and checkpoints know no more of it than this.

    Args:
        recipe: of the run.
        engine: of the nets that the method asks for.
        batch: images of this rank at a step, B.
        num_images: of the training split, N.
    """

    title: str  # name and paper
    num_first_images: int = 0  # that `start` reads, over all ranks; 0: there is no such start

    def __init__(self, recipe: Recipe, engine: Engine, batch: int, num_images: int):
        self.recipe, self.engine, self.num_images = recipe, engine, num_images
        # Objects with `state_dict` and `load_state_dict`, by their names in checkpoints.
        self.parts: dict[str, Any] = {}

    @abstractmethod
    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """Trains the nets on this rank's part of the batch of `step`, from 0."""

    def start(self, batches: Iterable[Batch]) -> None:
        """Before the first step: reads what it begins with off the initial net.

        Raises:
            StopRequested: on all ranks alike; the nets are as they were.
        """
        raise NotImplementedError("this method has no start")

    def state_dict(self) -> dict[str, Partition]:
        """What this rank holds of its parts; tensors that are no partitions are alike on all."""
        return {
            f"{part}.{name}": x if isinstance(x, Partition) else Partition.replicated(x)
            for part, owner in self.parts.items()
            for name, x in owner.state_dict().items()
        }

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Takes this rank's values of `state_dict`; others among them are not its own."""
        for part, owner in self.parts.items():
            prefix = f"{part}."
            own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
            owner.load_state_dict(own)


class GroupMethod(Method):
    """A method that puts images into groups."""

    def __init__(self, recipe: Recipe, engine: Engine, batch: int, num_images: int):
        super().__init__(recipe, engine, batch, num_images)
        self.usage = GroupUsage(recipe.grouping.num_groups, engine.device)  # over the last steps
        self.parts["usage"] = self.usage

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Adds the groups [B] of this rank's images to the usage; a collective."""
        num_groups, ones = self.recipe.grouping.num_groups, torch.ones_like(ids)
        counts = torch.zeros(num_groups, dtype=ids.dtype, device=ids.device)
        self.usage.push(distributed.all_reduce(counts.index_add_(0, ids, ones)))

    @abstractmethod
    def centroids(self) -> Tensor:
        """The groups [K, D], unit rows, the same on every rank; a collective."""


@torch.no_grad()
def first_features(engine: Engine, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, and z [B, D] of their first views by the initial net; its running statistics stay.

    Raises:
        StopRequested: on all ranks alike.
    """
    with frozen_running_stats(engine.online):
        for batch in batches:
            phases.check_for_stop()
            z, _ = engine.forward_online(batch.large[0], [])
            yield batch, z


def cosine_ema(alpha: float, progress: float) -> float:
    """Alpha of the momentum net on its cosine from `alpha` to 1 (BYOL section 3.2).

    Args:
        alpha: of the first step.
        progress: share of the run that is done.
    """
    return 1 - (1 - alpha) * (1 + math.cos(math.pi * progress)) / 2
