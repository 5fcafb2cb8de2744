"""What changes over a run, as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Protocol, Self

from scale_smog.config import GroupingConfig, OptimizerConfig, RunConfig


@dataclass(frozen=True)
class ScheduledValues:
    """What a step trains with."""

    epoch: float  # done after this step
    progress: float  # share of the run that is done before it
    lr: float
    weight_decay: float
    beta: float


class StepPlan(Protocol):
    """What a run's length follows from (`data.EpochPlan`)."""

    num_samples: int
    global_batch: int

    def steps(self, epochs: float) -> int: ...


class Schedules:
    """Learning rate: linear warm-up, then cosine to zero; beta: linear (SMoG sections 3.2, 4.1).

    Args:
        optimizer: base rate, its reference batch, warm-up.
        grouping: first and last beta.
        global_batch: scales the base rate.
        num_steps: T, of the run.
        steps_per_epoch: samples / global batch, not rounded.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig,
        grouping: GroupingConfig,
        global_batch: int,
        num_steps: int,
        steps_per_epoch: float,
    ):
        self.peak_lr = optimizer.base_lr * global_batch / optimizer.lr_batch
        self.weight_decay = optimizer.weight_decay
        self.betas = (grouping.beta_start, grouping.beta_end)
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.warmup_steps = min(num_steps, round(optimizer.warmup_epochs * steps_per_epoch))

    @classmethod
    def of_run(
        cls,
        run: RunConfig,
        optimizer: OptimizerConfig,
        grouping: GroupingConfig,
        plan: StepPlan,
    ) -> Self:
        """The schedules of a run of `run.steps` or `run.epochs`."""
        num_steps = run.steps or plan.steps(run.epochs or 0)
        per_epoch = plan.num_samples / plan.global_batch
        return cls(optimizer, grouping, plan.global_batch, num_steps, per_epoch)

    def at(self, step: int) -> ScheduledValues:
        """Values of `step`, from 0."""
        start, end = self.betas
        beta = start + (end - start) * step / max(1, self.num_steps - 1)
        epoch = (step + 1) / self.steps_per_epoch
        progress = step / max(1, self.num_steps)
        return ScheduledValues(epoch, progress, self._lr(step), self.weight_decay, beta)

    def remarks(self) -> list[str]:
        """A line if the learning rate never comes to its cosine."""
        if self.warmup_steps < self.num_steps:
            return []
        return [
            f"warning: all {self.num_steps} steps are warm-up: a shorter optimizer.warmup_epochs "
            "lets the learning rate come down again"
        ]

    def _lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens at `step`; 0 is never."""
    return every > 0 and step % every == 0
