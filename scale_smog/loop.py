"""The training loop of SMoG; it knows no backend."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scale_smog import checkpoint, distributed
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.grouping import (
    FeatureBank,
    GroupUsage,
    MomentumGroups,
    chance_loss,
    collapse_warning,
    perplexity,
)
from scale_smog.loss import group_contrastive_loss
from scale_smog.metrics import Metrics, StepClock
from scale_smog.preemption import Preemption
from scale_smog.schedules import Now, Schedules, due


@dataclass
class TrainState:
    """All that a run is, besides its recipe."""

    engine: Engine
    groups: MomentumGroups
    bank: FeatureBank
    usage: GroupUsage
    step: int = 0  # finished steps

    def full_state(self) -> dict[str, Tensor]:
        """Tensors that know no engine and no number of ranks; a collective."""
        state = self.engine.full_state()
        state |= {f"groups.{k}": v for k, v in self.groups.state_dict().items()}
        state |= {f"bank.{k}": v for k, v in self.bank.full_state().items()}
        return state | {f"usage.{k}": v for k, v in self.usage.full_state().items()}

    def load_full_state(self, state: dict[str, Tensor], step: int) -> None:
        """Inverse of `full_state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.engine.load_full_state(state)
        self.groups.load_state_dict(part("groups."))
        self.bank.load_full_state(part("bank."))
        self.usage.load_full_state(part("usage."))
        self.step = step


def train(
    recipe: Recipe,
    state: TrainState,
    batches: Iterable[Batch],
    schedules: Schedules,
    metrics: Metrics,
    evaluate: Callable[[int], None],
    facts: dict[str, str],
) -> bool:
    """Trains from `state.step` to the end of the schedules.

    Args:
        recipe: of the run.
        state: changed in place.
        batches: one for each step from `state.step` on.
        schedules: rates of a step, and the number of steps.
        metrics: where to report.
        evaluate: called with the finished steps, every `run.evaluate_every`.
        facts: kept in checkpoints.

    Returns:
        True at the end of the run, False when a signal ended it earlier.
    """
    run, grouping = recipe.run, recipe.grouping
    engine, groups, bank = state.engine, state.groups, state.bank
    preemption, clock, loader = Preemption(), StepClock(), iter(batches)
    saved_step = state.step

    while state.step < schedules.num_steps:
        now = schedules.at(state.step)
        batch = clock.next(loader)
        online_view, momentum_view = batch.views(swap=state.step % 2 == 1)

        reset = state.step > 0 and due(state.step, grouping.reset_every)
        if reset and grouping.kmeans:
            report = groups.reseed_from(bank)  # multi-node k-means over the cached features
            metrics.scalars(state.step, {f"reset/{k}": v for k, v in vars(report).items()})
        if reset and grouping.reset_momentum:
            engine.reset_momentum()
        else:
            engine.ema(recipe.model.ema)

        z, p = engine.forward_online(online_view, batch.small)  # [B, D], [V, B, D]
        target = groups.assign(engine.forward_momentum(momentum_view))  # [B]
        new_groups = groups.updated_by(z, now.beta)  # [K, D], over the global batch, with gradient
        loss = group_contrastive_loss(p, new_groups, target, grouping.temperature)
        engine.backward(loss)
        engine.step(now.lr, now.weight_decay)
        groups.commit(new_groups)
        bank.push(z)
        state.usage.push(groups.counts)
        state.step += 1

        if state.step == 1:
            metrics.images("views", [*batch.large, *batch.small])
        metrics.advance()
        if due(state.step, run.log_every) or state.step in (1, schedules.num_steps):
            _log(recipe, state, loss, now, clock, metrics)
        if due(state.step, run.checkpoint_every):
            saved_step = save(recipe, state, facts)
        if due(state.step, run.evaluate_every):
            evaluate(state.step)
            clock.restart()
        if preemption.agreed():
            break
    if saved_step != state.step:
        save(recipe, state, facts)
    preemption.close()
    return state.step == schedules.num_steps


def save(recipe: Recipe, state: TrainState, facts: dict[str, str]) -> int:
    """Writes a checkpoint and removes the oldest; returns the step."""
    run_dir = Path(recipe.run.dir)
    checkpoint.save(run_dir, state.step, state.full_state(), facts)
    checkpoint.remove_old(run_dir, recipe.run.keep_checkpoints)
    return state.step


def _log(
    recipe: Recipe, state: TrainState, loss: Tensor, now: Now, clock: StepClock, metrics: Metrics
) -> None:
    """Reports the step just finished; the only place where the host waits for its loss."""
    mean_loss = distributed.all_reduce(loss.detach().clone()) / distributed.world_size()
    usage = state.usage.counts()
    metrics.log(
        {
            "step": state.step,
            "epoch": now.epoch,
            "loss": mean_loss.item(),
            "chance_loss": chance_loss(recipe.grouping.num_groups),
            "lr": now.lr,
            "beta": now.beta,
            **clock.report(recipe.data.global_batch),
            "groups_in_use": int((usage > 0).sum()),
            "group_perplexity": perplexity(usage),
            "largest_group_share": (usage.max() / usage.sum()).item(),
        }
    )
    metrics.histogram(state.step, "group_usage", usage)
    if warning := collapse_warning(usage):
        metrics.say(f"warning: {warning}")
