"""The training loop; it knows neither backend nor method."""

from collections.abc import Callable, Iterable

from scale_smog.checkpoint import Checkpoints
from scale_smog.config import RunConfig
from scale_smog.data.batch import Batch
from scale_smog.errors import UserError
from scale_smog.evaluation.online import OnlineProbe
from scale_smog.methods import StepReport
from scale_smog.reporting.progress import Progress
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues, Schedules, due
from scale_smog.state import TrainState


def train(
    run: RunConfig,
    state: TrainState,
    batches: Iterable[Batch],
    schedules: Schedules,
    progress: Progress,
    checkpoints: Checkpoints,
    evaluate: Callable[[int], None],
    probe: OnlineProbe | None = None,
) -> None:
    """Trains from `state.step` to the end of the schedules; the last step is saved.

    Raises:
        StopRequested: on all ranks alike, in a step, k-means or an evaluation; the last finished
            step is saved.
        UserError: too many steps in a row were not finite, or the last one could not be saved.
    """
    loader = iter(batches)
    try:
        while state.step < schedules.num_steps:
            phases.enter(phases.DATA)
            batch, scheduled = progress.next_batch(loader), schedules.at(state.step)
            phases.enter(phases.STEP)
            report = train_step(state, batch, scheduled)
            progress.after_step(state.step, batch, report, scheduled, state.engine.features)
            if probe:
                if report.is_applied:  # else features may be NaN, and the probe would stay so
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
        save_last(state, checkpoints, progress)
        raise
    save_last(state, checkpoints, progress)


def train_step(state: TrainState, batch: Batch, scheduled: ScheduledValues) -> StepReport:
    """One step of the run's method on this rank's part of the batch."""
    report = state.method.train_step(batch, scheduled, state.step)
    state.step += 1
    return report


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
