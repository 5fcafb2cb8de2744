"""Pre-training: builds the parts in the order of the data's flow, then runs the loop."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from scale_smog import distributed
from scale_smog.checkpoint import Checkpoints, list_checkpoints
from scale_smog.checkpoint.mirror import bring_back
from scale_smog.checkpoint.start_from import fitting, read_start
from scale_smog.config import Recipe
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images, remarks
from scale_smog.data.loaders.build import (
    build_plan,
    build_training_loader,
    open_together,
    require_loader,
)
from scale_smog.data.remote.space import use_cache
from scale_smog.errors import RankError, RunEnded, UserError
from scale_smog.evaluation.final import conclude
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.online import OnlineProbe
from scale_smog.evaluation.splits import CannotEvaluate, require_labels
from scale_smog.loop import train
from scale_smog.preflight.checks import require_equal_hosts
from scale_smog.reporting import run_folder
from scale_smog.reporting.curves import draw_run_curves
from scale_smog.reporting.health import StopBelow
from scale_smog.reporting.metrics import Metrics
from scale_smog.reporting.progress import Progress
from scale_smog.reporting.starts import note_end, note_start
from scale_smog.runtime import flight_recorder, phases, rank_logs
from scale_smog.runtime.preemption import Preemption
from scale_smog.runtime.rank_logs import RankLogs
from scale_smog.runtime.watchdog import Watchdog
from scale_smog.schedules import Schedules
from scale_smog.small_data import fit_to_data
from scale_smog.state import TrainState, build_state

# To the copy of the last checkpoint; after a signal that ends a machine it has seconds.
MIRROR_S, MIRROR_AFTER_STOP_S, MIRROR_LOOK_S = 1200.0, 15.0, 1.0
WATCHDOG_S = 600.0  # for it to say which rank is behind, before a collective breaks


def pretrain(recipe: Recipe) -> None:
    """Trains a recipe to its end, or on from the newest checkpoint of its run folder.

    SIGTERM, SIGUSR1 or Ctrl-C on any rank, at any time, ends the run with a checkpoint.

    Raises:
        UserError: a setting, the dataset or the run folder does not fit; on every rank.
    """
    flight_recorder.configure(Path(recipe.run.dir) / rank_logs.FOLDER)
    timeout_s = max(recipe.deadlines.model_dump().values()) + WATCHDOG_S
    with (
        Preemption() as preemption,
        distributed.process_group(meeting=preemption.ends_process(), timeout_s=timeout_s) as device,
        Watchdog(recipe.deadlines) as watchdog,
        RankLogs() as logs,
    ):
        try:
            run(recipe, device, logs)
        except RuntimeError:  # of a collective, if a rank is gone
            watchdog.report_lost_ranks()
            raise


def run(recipe: Recipe, device: torch.device, logs: RankLogs) -> None:
    """`pretrain` within a process group."""
    use_cache(recipe.data.cache_dir, recipe.data.cache_gib)
    require_equal_hosts(recipe)
    recipe = in_main_folder(recipe)
    bring_back(recipe.run)
    dataset = open_together(recipe.data.path, "train")
    if recipe.evaluation.online:
        require_labels(dataset, recipe.data.path, "evaluation.online")
    kept = distributed.call_on_main(lambda: run_folder.kept_recipe(recipe.run.dir))
    recipe, derived = fit_to_data(recipe, dataset.num_samples, kept)
    data, run_dir = recipe.data, Path(recipe.run.dir)
    plan = build_plan(data, dataset, recipe.run.seed)
    schedules = Schedules.of_run(recipe.run, recipe.optimizer, recipe.grouping, plan)
    views = training_views(data, recipe.augment)
    require_loader(data, device)
    knn = build_knn_probe(recipe, device, dataset)
    batch = plan.images_per_rank(distributed.world_size())
    has_begun = distributed.call_on_main(lambda: bool(list_checkpoints(run_dir)))
    # A run that goes on does not read what it began with, which may be gone.
    first = recipe.with_values("model", weights="") if has_begun else recipe
    state, begun = build_state(first, batch, device, dataset.num_samples), []
    if recipe.run.start_from and not has_begun:
        recipe, begun = begin_from_start(recipe, state)

    def load(steps: range) -> Iterable[Batch]:
        return build_training_loader(data, views, dataset, plan, steps, device)

    # From here on the settings are known to be good, and the run folder is written.
    with run_folder.claimed(recipe, dataset.sha256) as changes:
        logs.open(run_dir)
        checkpoints = Checkpoints(recipe.run, {"manifest_sha256": dataset.sha256})
        warnings = restore(state, checkpoints)
        is_finished = state.step >= schedules.num_steps
        if not is_finished and (problem := checkpoints.prepare(state.state_dict())):
            warnings.append(f"warning: {problem}")
        stop_below = StopBelow(recipe.run.stop_below, recipe.run.stop_patience)
        metrics = Metrics(run_dir, state.step, schedules.num_steps, data.global_batch, stop_below)
        note_start(recipe, state.step, device)
        changed = [f"changed since the run began: {x}" for x in changes]
        lines = [*remarks(dataset), *precision_remarks(recipe, device), *derived]
        lines += [*schedules.remarks(), *begun, *changed, *warnings]
        for line in lines:
            metrics.say(line)

        try:
            if not is_finished:
                train_remaining(recipe, state, dataset, load, schedules, knn, checkpoints, metrics)
            with phases.during(phases.EVALUATION):
                conclude(recipe, state, dataset, knn, metrics)
                metrics.close()
                if distributed.is_main():
                    draw_run_curves(run_dir)
                note_end(run_dir, state.step)
            await_mirror(checkpoints, metrics, MIRROR_S)
        except phases.StopRequested:  # a launcher kills who takes long to stop: no curves
            metrics.say(f"stopped after step {state.step}; the same command resumes from there")
            await_mirror(checkpoints, metrics, MIRROR_AFTER_STOP_S, is_stopping=True)
            metrics.close()
        except RunEnded:
            metrics.close()
            note_end(run_dir, state.step)
            raise


def train_remaining(
    recipe: Recipe,
    state: TrainState,
    dataset: Images,
    load: Callable[[range], Iterable[Batch]],
    schedules: Schedules,
    knn: KnnProbe | None,
    checkpoints: Checkpoints,
    metrics: Metrics,
) -> None:
    """The method's start, if there is no step yet, and the steps that are left.

    Raises:
        StopRequested: on all ranks alike, after a checkpoint.
    """

    def evaluate(step: int) -> None:
        if knn:
            with phases.during(phases.EVALUATION):
                embed = partial(state.engine.embed, of=recipe.evaluation.net)
                accuracy = knn.accuracy(phases.stoppable(embed))
            metrics.scalars(step, {"knn": accuracy})
            metrics.say(f"step {step}  kNN top-1 {accuracy:.3f}")

    metrics.say(f"{'resuming' if state.step else 'starting'} {describe(recipe, state)}")
    if state.step == 0 and (num_images := state.method.num_first_images):
        num_batches = -(-num_images // recipe.data.global_batch)
        start_or_save(state, load(range(num_batches)), checkpoints)
    online = build_online_probe(recipe, state, dataset)
    batches = load(range(state.step, schedules.num_steps))
    progress = Progress(recipe, metrics, schedules.num_steps, state.engine.device)
    with saves_finished(checkpoints):
        train(recipe.run, state, batches, schedules, progress, checkpoints, evaluate, online)


def in_main_folder(recipe: Recipe) -> Recipe:
    """With rank 0's run folder, where a rank in another working folder would take another."""
    own = Path(recipe.run.dir).absolute()
    main = distributed.broadcast_object(own)
    if main == own:
        return recipe
    return recipe.with_values("run", dir=str(main))


def begin_from_start(recipe: Recipe, state: TrainState) -> tuple[Recipe, list[str]]:
    """Puts what `run.start_from` names into a state.

    Returns:
        The recipe with the hash of what the run begins with, and a line on each thing that was
        taken, that does not fit, or that is set in another way than it was there.

    Raises:
        UserError: there is no such start, or it is another net.
    """
    run, own = recipe.run, state.state_dict()
    backbone = state.engine.online.backbone
    start = read_start(run.start_from, run.start_sha256, backbone)
    values, lines = fitting(start, own, run.start_parts, run.start_from)
    state.load_state_dict({name: x.values for name, x in own.items()} | values, step=0)
    if "groups.centroids" in values:
        state.method.num_first_images = 0  # they need no start of their own
    if start.run_dir:
        lines += run_folder.trained_otherwise(start.run_dir, recipe)
    return recipe.with_values("run", start_sha256=start.sha256), lines


def restore(state: TrainState, checkpoints: Checkpoints) -> list[str]:
    """Takes the newest valid checkpoint, if there is one; a warning on each that is not valid."""
    restored = checkpoints.load_newest(state.state_dict())
    if restored is None:
        return []
    state.load_state_dict(restored.values, restored.step)
    return [f"warning: passed over {line}" for line in restored.passed_over]


def start_or_save(state: TrainState, batches: Iterable[Batch], checkpoints: Checkpoints) -> None:
    """The method's start; a run that is stopped in it has its checkpoint too, of step 0."""
    try:
        state.method.start(batches)
    except phases.StopRequested:
        checkpoints.save(0, state.state_dict())
        if problem := checkpoints.wait():
            raise UserError(problem) from None
        raise


def await_mirror(
    checkpoints: Checkpoints, metrics: Metrics, seconds: float, is_stopping: bool = False
) -> None:
    """Gives the copy of the last checkpoint some time; a collective.

    Raises:
        StopRequested: on all ranks alike, unless the run is stopping anyway.
        UserError: the copy is not there in time, unless the run is stopping.
    """
    problem = None
    for _ in range(math.ceil(seconds / MIRROR_LOOK_S)):
        with phases.during(phases.SAVING):  # whose deadline begins anew with every look
            problem = distributed.call_on_main(lambda: checkpoints.wait_for_mirror(MIRROR_LOOK_S))
        if not problem:
            return
        if not is_stopping:
            phases.check_for_stop()
    if not is_stopping:
        raise UserError(f"trained to the end, but {problem}; the same command copies it again")
    metrics.say(f"warning: {problem}")


@contextmanager
def saves_finished(checkpoints: Checkpoints) -> Iterator[None]:
    """A user's error ends the training within only after the checkpoint that is being written."""
    try:
        yield
    except UserError as error:
        if distributed.is_main() or isinstance(error, RankError):
            ending = f"ending, after a checkpoint that is on its way: {error}"
            print(ending, file=rank_logs.console(), flush=True)
        with phases.during(phases.SAVING), suppress(Exception):
            checkpoints.wait()
        raise


def build_knn_probe(recipe: Recipe, device: torch.device, train: Images) -> KnnProbe | None:
    """kNN on the dataset's test split; None, and a word on the console, where it has none.

    Raises:
        UserError: the split is there and cannot be read, or run.stop_below needs it.
    """
    try:
        return KnnProbe(recipe.data, recipe.evaluation, device, train)
    except CannotEvaluate as error:
        if "knn" in recipe.run.stop_below:
            raise
        if distributed.is_main():
            print(f"no kNN: {error}", flush=True)
        return None


def build_online_probe(recipe: Recipe, state: TrainState, dataset: Images) -> OnlineProbe | None:
    """Classifiers on the views in training, where the recipe asks for them."""
    if not recipe.evaluation.online:
        return None
    num_features: int = state.engine.online.backbone.num_features  # pyright: ignore[reportAssignmentType]
    return OnlineProbe(num_features, dataset.num_classes, state.engine.device)


def precision_remarks(recipe: Recipe, device: torch.device) -> list[str]:
    """A line where fp32 is faster."""
    if recipe.engine.precision != "bf16" or distributed.computes_in_bf16(device.type):
        return []
    return ["this processor has no instructions for bf16: engine.precision=fp32 is faster on it"]


def describe(recipe: Recipe, state: TrainState) -> str:
    """What is trained, where and how, in a line or two."""
    what = recipe.method.name
    if recipe.method.has_groups:
        what += f" with {recipe.grouping.num_groups} groups"
    text = (
        f"{recipe.run.dir} after step {state.step}: {recipe.model.backbone} on "
        f"{distributed.world_size()} rank(s) of {state.engine.device.type}, {recipe.engine.kind}, "
        f"{recipe.engine.precision}, {what}, data by {recipe.data.loader}"
    )
    num = recipe.engine.accumulate
    if num > 1:
        text += f"\n{num} micro-batches a step: batch norm sees one, groups and bank the batch"
    return text
