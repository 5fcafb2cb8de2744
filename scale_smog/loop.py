"""The training loop of SMoG; it knows no backend."""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from scale_smog import distributed
from scale_smog.checkpoint import Checkpoints
from scale_smog.config import GroupingConfig, Recipe
from scale_smog.data.batch import Batch
from scale_smog.distributed import Partition
from scale_smog.engine import Engine
from scale_smog.errors import RankError, UserError
from scale_smog.grouping import (
    FeatureBank,
    GroupUsage,
    MomentumGroups,
    ResetReport,
    chance_loss,
    collapse_warning,
    perplexity,
)
from scale_smog.loss import group_contrastive_loss, instance_contrastive_loss
from scale_smog.reporting.health import SkippedSteps, Stragglers
from scale_smog.reporting.metrics import Metrics, StepClock
from scale_smog.runtime import phases, rank_logs
from scale_smog.schedules import Now, Schedules, due


@dataclass
class TrainState:
    """All that a run is, besides its recipe."""

    engine: Engine
    groups: MomentumGroups
    bank: FeatureBank
    usage: GroupUsage
    step: int = 0  # finished steps

    def state_dict(self) -> dict[str, Partition]:
        """What this rank holds of it, under names that know no engine and no number of ranks."""
        groups = {name: Partition.replicated(x) for name, x in self.groups.state_dict().items()}
        parts = {"groups": groups, "bank": self.bank.state_dict(), "usage": self.usage.state_dict()}
        partitions = self.engine.state_dict()
        for prefix, part in parts.items():
            partitions |= {f"{prefix}.{name}": partition for name, partition in part.items()}
        return partitions

    def load(self, values: dict[str, Tensor], step: int) -> None:
        """Takes values for its partitions, as they were after `step` steps."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

        self.engine.load(values)
        self.groups.load_state_dict(part("groups."))
        self.bank.load(part("bank."))
        self.usage.load(part("usage."))
        self.step = step


class StepReport(NamedTuple):
    """What a step has to say."""

    loss: Tensor  # [], of this rank
    is_applied: bool  # on all ranks; False: not finite, and nothing has changed
    reset: ResetReport | None  # what k-means did to the groups, where the step began with it


def train(
    recipe: Recipe,
    state: TrainState,
    batches: Iterable[Batch],
    schedules: Schedules,
    metrics: Metrics,
    evaluate: Callable[[int], None],
    checkpoints: Checkpoints,
) -> bool:
    """Trains from `state.step` to the end of the schedules; the last step is saved.

    Args:
        recipe: of the run.
        state: changed in place.
        batches: one for each step from `state.step` on.
        schedules: rates of a step, and the number of steps.
        metrics: where to report.
        evaluate: called with the finished steps, every `run.evaluate_every`.
        checkpoints: where to save.

    Returns:
        True at the end of the run, False when a signal ended it earlier.

    Raises:
        UserError: too many steps in a row were not finite, or the last one could not be saved.
    """
    run = recipe.run
    clock, loader, saved_step = StepClock(), iter(batches), state.step
    skipped, stragglers = SkippedSteps(run), Stragglers(state.engine.device)
    is_stopped = False
    try:
        while state.step < schedules.num_steps:
            phases.enter(phases.DATA)
            batch, now = _next_batch(clock, loader), schedules.at(state.step)
            phases.enter(phases.STEP)
            report = train_step(recipe, state, batch, now)
            if report.reset:
                metrics.scalars(
                    state.step, {f"reset/{k}": v for k, v in vars(report.reset).items()}
                )

            if state.step == 1:
                metrics.images("views", [*batch.large, *batch.small])
            metrics.advance()
            skipped.note(state.step, report.is_applied, report.loss, batch, metrics.say)
            if due(state.step, run.log_every) or state.step in (1, schedules.num_steps):
                _log(recipe, state, report, now, clock, stragglers, metrics)
            if due(state.step, run.checkpoint_every):
                saved_step = save(state, checkpoints, metrics)
            if due(state.step, run.evaluate_every):
                evaluate(state.step)
                clock.restart()
            phases.check_for_stop()
    except phases.StopRequested:  # in k-means or an evaluation too: the last finished step stands
        is_stopped = True
    except UserError as error:
        if distributed.is_main() or isinstance(error, RankError):
            ending = f"ending, after a checkpoint that is on its way: {error}"
            print(ending, file=rank_logs.console(), flush=True)
        with phases.during(phases.SAVING), suppress(Exception):
            checkpoints.wait()
        raise
    if saved_step != state.step:
        save(state, checkpoints, metrics)
    with phases.during(phases.SAVING):
        if problem := checkpoints.wait():
            raise UserError(problem)
    return not is_stopped


def train_step(recipe: Recipe, state: TrainState, batch: Batch, now: Now) -> StepReport:
    """One step of SMoG on this rank's part of the batch."""
    grouping = recipe.grouping
    engine, groups, bank = state.engine, state.groups, state.bank
    if state.step < grouping.instance_warmup_steps:
        return instance_step(recipe, state, batch, now)
    online_view, momentum_view = batch.views(swap=state.step % 2 == 1)
    report = reset_if_due(grouping, state)

    z, p = engine.forward_online(online_view, batch.small)  # [B, D], [V, B, D]
    target = groups.assign(engine.forward_momentum(momentum_view))  # [B]
    new_groups = groups.updated_by(z, now.beta)  # [K, D], over the global batch, with gradient
    loss = group_contrastive_loss(p, new_groups, target, grouping.temperature)
    engine.backward(loss)
    is_applied = engine.step(now.lr, now.weight_decay)
    if is_applied:  # else a loss or a gradient was not finite: the step leaves nothing behind
        groups.commit(new_groups)
        bank.push(z)
        state.usage.push(groups.counts)
        engine.update_ema(recipe.model.ema)
    state.step += 1
    return StepReport(loss, is_applied, report)


def reset_if_due(grouping: GroupingConfig, state: TrainState) -> ResetReport | None:
    """Groups by k-means over the cached features of all ranks, momentum net from the online one."""
    report, is_first = None, state.step == grouping.instance_warmup_steps
    if state.step == 0 or not (is_first or due(state.step, grouping.reset_every)):
        return None
    if is_first:  # the groups of the initial net are of no use to a net that has learnt
        with phases.during(phases.KMEANS):
            state.groups.start_from(state.bank)
    elif grouping.kmeans:
        with phases.during(phases.KMEANS):
            report = state.groups.reseed_from(state.bank)
    if is_first or grouping.reset_momentum:
        state.engine.reset_momentum()
    return report


def instance_step(recipe: Recipe, state: TrainState, batch: Batch, now: Now) -> StepReport:
    """A step of the instance-contrastive start: both views are trained, the groups rest.

    Not in the paper; docs/learning.md has its effect.
    """
    engine = state.engine
    first, second = batch.large
    z, p = engine.forward_online(first, [second])  # [B, D], [2, B, D]
    loss = instance_contrastive_loss(p)
    engine.backward(loss)
    is_applied = engine.step(now.lr, now.weight_decay)
    if is_applied:
        state.bank.push(z)
        engine.update_ema(recipe.model.ema)
    state.step += 1
    return StepReport(loss, is_applied, None)


def save(state: TrainState, checkpoints: Checkpoints, metrics: Metrics) -> int:
    """Starts a checkpoint, which blocks for a copy of the state; returns the step."""
    with phases.during(phases.SAVING):
        if problem := checkpoints.save(state.step, state.state_dict()):
            metrics.say(f"warning: {problem}; training goes on")
    return state.step


def _next_batch(clock: StepClock, loader: Iterator[Batch]) -> Batch:
    try:
        return clock.next(loader)
    except UserError as error:  # the others wait in the step
        where = f"rank {distributed.rank()} on {socket.gethostname()}"
        raise RankError(
            f"{where}: {error}; when the data is there again, the same command goes on from the "
            "newest checkpoint"
        ) from error


def _log(
    recipe: Recipe,
    state: TrainState,
    report: StepReport,
    now: Now,
    clock: StepClock,
    stragglers: Stragglers,
    metrics: Metrics,
) -> None:
    """Reports the step just finished; one that was left out has been reported already."""
    speed = clock.report(recipe.data.global_batch)
    if warning := stragglers.found(speed["data_wait"]):
        metrics.say(f"warning: {warning}")
    if not report.is_applied:
        return
    mean_loss = distributed.all_reduce(report.loss.detach().clone()) / distributed.world_size()
    is_warm_up = state.step <= recipe.grouping.instance_warmup_steps  # the groups rest
    num_choices = 2 * recipe.data.global_batch - 1 if is_warm_up else recipe.grouping.num_groups
    figures = {
        "step": state.step,
        "epoch": now.epoch,
        "loss": mean_loss.item(),
        "chance_loss": chance_loss(num_choices),
        "lr": now.lr,
        "beta": now.beta,
        **speed,
    }
    if is_warm_up:
        metrics.log(figures)
        return
    usage = state.usage.counts()
    metrics.log(
        {
            **figures,
            "groups_in_use": int((usage > 0).sum()),
            "group_perplexity": perplexity(usage),
            "largest_group_share": (usage.max() / usage.sum()).item(),
        }
    )
    metrics.histogram(state.step, "group_usage", usage)
    if warning := collapse_warning(usage):
        metrics.say(f"warning: {warning}")
