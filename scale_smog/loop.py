"""The training loop of SMoG; it knows no backend."""

from collections.abc import Callable, Iterable

from scale_smog.checkpoint import Checkpoints
from scale_smog.config import GroupingConfig, Recipe
from scale_smog.data.batch import Batch
from scale_smog.errors import UserError
from scale_smog.evaluation.online import OnlineProbe
from scale_smog.grouping import ResetReport
from scale_smog.loss import group_contrastive_loss, instance_contrastive_loss
from scale_smog.reporting.progress import Progress, StepReport
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues, Schedules, due
from scale_smog.state import TrainState


def train(
    recipe: Recipe,
    state: TrainState,
    batches: Iterable[Batch],
    schedules: Schedules,
    progress: Progress,
    checkpoints: Checkpoints,
    evaluate: Callable[[int], None],
    probe: OnlineProbe | None = None,
) -> bool:
    """Trains from `state.step` to the end of the schedules; the last step is saved.

    Returns:
        False if a stop request ended it: in a step, k-means or an evaluation; the last finished
        step stands.

    Raises:
        UserError: too many steps in a row were not finite, or the last one could not be saved.
    """
    run, loader, is_stopped = recipe.run, iter(batches), False
    try:
        while state.step < schedules.num_steps:
            phases.enter(phases.DATA)
            batch, scheduled = progress.next_batch(loader), schedules.at(state.step)
            phases.enter(phases.STEP)
            report = train_step(recipe, state, batch, scheduled)
            progress.after_step(state.step, batch, report, scheduled, state.usage)
            if probe:
                probe.update(state.step, state.engine.features, batch.label)
                if due(state.step, run.log_every):
                    progress.metrics.scalars(state.step, probe.accuracies())
            if due(state.step, run.checkpoint_every):
                save(state, checkpoints, progress)
            if due(state.step, run.evaluate_every):
                evaluate(state.step)
                progress.restart()
            phases.check_for_stop()
    except phases.StopRequested:
        is_stopped = True
    save_last(state, checkpoints, progress)
    return not is_stopped


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, scheduled: ScheduledValues
) -> StepReport:
    """One step of SMoG on this rank's part of the batch."""
    engine, groups, grouping = state.engine, state.groups, recipe.grouping
    if state.step < grouping.instance_warmup_steps:
        return instance_step(recipe, state, batch, scheduled)
    online_view, momentum_view = batch.views(swap=state.step % 2 == 1)
    reset = reset_if_due(grouping, state)

    z, p = engine.forward_online(online_view, batch.small)  # [B, D], [V, B, D]
    target = groups.assign(engine.forward_momentum(momentum_view))  # [B]
    new_groups = groups.updated_by(z, scheduled.beta)  # [K, D], over the global batch, with grad
    loss = group_contrastive_loss(p, new_groups, target, grouping.temperature)
    engine.backward(loss)
    is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
    if is_applied:  # else a loss or a gradient was not finite: the step leaves nothing behind
        groups.commit(new_groups)
        state.bank.push(z)
        state.usage.push(groups.counts)
        engine.update_ema(recipe.model.ema)
    state.step += 1
    return StepReport(loss, is_applied, reset)


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


def instance_step(
    recipe: Recipe, state: TrainState, batch: Batch, scheduled: ScheduledValues
) -> StepReport:
    """A step of the instance-contrastive start: both views are trained, the groups rest.

    Not in the paper; docs/learning.md has its effect.
    """
    engine = state.engine
    first, second = batch.large
    z, p = engine.forward_online(first, [second])  # [B, D], [2, B, D]
    loss = instance_contrastive_loss(p)
    engine.backward(loss)
    is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
    if is_applied:
        state.bank.push(z)
        engine.update_ema(recipe.model.ema)
    state.step += 1
    return StepReport(loss, is_applied, None)


def save(state: TrainState, checkpoints: Checkpoints, progress: Progress) -> None:
    """Starts a checkpoint, which blocks for a copy of the state."""
    with phases.during(phases.SAVING):
        if problem := checkpoints.save(state.step, state.state_dict()):
            progress.metrics.say(f"warning: {problem}; training goes on")


def save_last(state: TrainState, checkpoints: Checkpoints, progress: Progress) -> None:
    """Saves the last finished step, unless it is saved, and waits for it.

    Raises:
        UserError: it could not be written.
    """
    if checkpoints.newest_step != state.step:
        save(state, checkpoints, progress)
    with phases.during(phases.SAVING):
        if problem := checkpoints.wait():
            raise UserError(problem)
