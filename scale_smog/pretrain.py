"""Pre-training: builds the parts in the order of the data's flow, then runs the loop."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scale_smog import checkpoint, distributed
from scale_smog.checkpoint import Checkpoints
from scale_smog.config import ModelConfig, Recipe
from scale_smog.data import EpochPlan, TarDataset, manifest_sha256
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.loaders.build import build_plan, build_training_loader, require_loader
from scale_smog.engine import build_engine
from scale_smog.errors import UserError
from scale_smog.evaluation import KnnProbe, OnlineProbe, draw_groups, embed_images
from scale_smog.evaluation.splits import require_labels
from scale_smog.grouping import FeatureBank, GroupUsage, MomentumGroups, perplexity
from scale_smog.loop import TrainState, train
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    build_nets,
    frozen_running_stats,
    process_group_for,
    synchronise_batch_norm,
)
from scale_smog.models.weights import load_weights
from scale_smog.preflight import require_equal_hosts
from scale_smog.profiling.memory import plan_memory
from scale_smog.recipe import dump_recipe
from scale_smog.reporting import run_folder
from scale_smog.reporting.curves import CURVES_FILE, draw_run_curves
from scale_smog.reporting.metrics import Metrics
from scale_smog.runtime import phases
from scale_smog.runtime.preemption import Preemption
from scale_smog.runtime.rank_logs import RankLogs
from scale_smog.runtime.watchdog import Watchdog
from scale_smog.schedules import Schedules
from scale_smog.small_data import fit_to_data

PICTURE_FILE = "groups.png"
NUM_PICTURED = 2048  # training images among which the picture finds each group's closest


def pretrain(recipe: Recipe) -> None:
    """Trains a recipe to its end, or on from the newest checkpoint of its run folder.

    SIGTERM, SIGUSR1 or Ctrl-C on any rank, at any time, ends the run with a checkpoint.

    Raises:
        UserError: a setting, the dataset or the run folder does not fit; on every rank.
    """
    with (
        Preemption(),
        distributed.process_group() as device,
        Watchdog(recipe.deadlines) as deadlines,
        RankLogs() as logs,
    ):
        try:
            _pretrain(recipe, device, logs)
        except RuntimeError:  # of a collective, if a rank is gone
            deadlines.report_lost_ranks()
            raise


def _pretrain(recipe: Recipe, device: torch.device, logs: RankLogs) -> None:
    data, run_dir = recipe.data, Path(recipe.run.dir)
    require_equal_hosts(recipe)
    dataset = TarDataset(data.path, "train")
    begun = run_folder.kept_recipe(recipe.run.dir)
    recipe, derived = fit_to_data(recipe, dataset.num_samples, begun)
    plan, schedules = plan_steps(recipe, dataset)
    views = training_views(data, recipe.augment)
    facts = {"manifest_sha256": manifest_sha256(data.path)}
    require_loader(data, device)
    probe = build_probe(recipe, device)
    batch = len(plan.ids(0, distributed.rank(), distributed.world_size()))
    state = build_state(recipe, batch, device)

    # From here on the settings are known to be good, and the run folder is written.
    changes = run_folder.claim(recipe, facts["manifest_sha256"])
    logs.open(run_dir)
    checkpoints = Checkpoints(recipe.run, facts)
    news = restore(recipe, state, checkpoints)
    if state.step < schedules.num_steps and (warning := checkpoints.prepare(state.state_dict())):
        news.append(f"warning: {warning}")
    metrics = Metrics(run_dir, state.step, schedules.num_steps, data.global_batch)
    changed = [f"changed since the run began: {change}" for change in changes]
    for line in [*derived, *changed, *news]:
        metrics.say(line)

    def load(steps: range) -> Iterable[Batch]:
        return build_training_loader(data, views, dataset, plan, steps, device)

    def evaluate(step: int) -> None:
        if probe:
            with phases.during(phases.EVALUATION):
                accuracy = probe.accuracy(stoppable(state.engine.embed))
            metrics.scalars(step, {"knn": accuracy})
            metrics.say(f"step {step}  kNN top-1 {accuracy:.3f}")

    try:
        if state.step < schedules.num_steps:
            metrics.say(f"{'resuming' if state.step else 'starting'} {_describe(recipe, state)}")
            if state.step == 0 and recipe.grouping.init == "kmeans":
                steps = range(-(-recipe.num_init_features // data.global_batch))
                start_or_save(state, load(steps), checkpoints)
            batches = load(range(state.step, schedules.num_steps))
            if recipe.evaluation.online:
                online = build_online_probe(state, dataset, data.path)
                report, every = metrics.scalars, recipe.run.log_every
                batches = online.watching(batches, state.step, every, report)
            if not train(recipe, state, batches, schedules, metrics, evaluate, checkpoints):
                raise phases.StopRequested
        with phases.during(phases.EVALUATION):
            conclude(recipe, state, dataset, probe, metrics)
    except phases.StopRequested:
        metrics.say(f"stopped after step {state.step}; the same command goes on from there")
    metrics.close()
    if distributed.is_main():
        draw_run_curves(run_dir)


def restore(recipe: Recipe, state: TrainState, checkpoints: Checkpoints) -> list[str]:
    """Takes the newest whole checkpoint, if there is one; a line on each that was not whole."""
    restored = checkpoints.load_newest(state.state_dict())
    if restored is None:
        return []
    state.load(restored.values, restored.step)
    if restored.format_version == 1:  # saved before the momentum update that belongs to its step
        state.engine.update_ema(recipe.model.ema)
    return [f"warning: passed over {line}" for line in restored.passed_over]


def stoppable(embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A net that can be stopped between two batches, on all ranks alike."""

    def embed_or_stop(images: Tensor) -> Tensor:
        phases.check_for_stop()
        return embed(images)

    return embed_or_stop


def _describe(recipe: Recipe, state: TrainState) -> str:
    text = (
        f"{recipe.run.dir} after step {state.step}: {recipe.model.backbone} on "
        f"{distributed.world_size()} rank(s) of {state.engine.device.type}, {recipe.engine.kind}, "
        f"{recipe.engine.precision}, {recipe.grouping.num_groups} groups, data by "
        f"{recipe.data.loader}"
    )
    num = recipe.engine.accumulate
    if num > 1:
        text += f"\n{num} micro-batches a step: batch norm sees one, groups and bank the batch"
    return text


def plan_steps(recipe: Recipe, dataset: TarDataset) -> tuple[EpochPlan, Schedules]:
    """The order of the samples, and the rates, of a run on a dataset."""
    run, global_batch = recipe.run, recipe.data.global_batch
    plan = build_plan(recipe.data, dataset, run.seed)
    num_steps = run.steps or plan.steps(run.epochs or 0)
    per_epoch = dataset.num_samples / global_batch
    return plan, Schedules(recipe.optimizer, recipe.grouping, global_batch, num_steps, per_epoch)


def build_state(recipe: Recipe, batch: int, device: torch.device) -> TrainState:
    """Nets, engine, groups and bank of a run that has not begun; the same on all ranks."""
    model, grouping = recipe.model, recipe.grouping
    torch.manual_seed(recipe.run.seed)
    online, momentum = first_nets(model)
    scope = process_group_for(model.batch_norm, distributed.ranks_per_node())
    for net in (online, momentum):
        synchronise_batch_norm(net.to(device), scope)
    engine = build_engine(online, momentum, recipe.optimizer, recipe.engine, batch)
    groups = MomentumGroups.from_config(grouping, model.dim, recipe.run.seed)
    return TrainState(
        engine=engine,
        groups=groups.to(device, engine.dtype),
        bank=FeatureBank(recipe.bank_steps, batch, model.dim, device),
        usage=GroupUsage(grouping.num_groups, device),
    )


def first_nets(model: ModelConfig) -> tuple[OnlineNet, MomentumNet]:
    """The nets as training begins: with random weights, or a file's in their backbones."""
    nets = build_nets(model)
    if model.weights:
        for net in nets:
            load_weights(net.backbone, model.weights)
    return nets


@torch.no_grad()
def start_groups(state: TrainState, batches: Iterable[Batch]) -> None:
    """First groups: k-means over features of the initial net (SMoG section 4.1)."""
    embed = stoppable(lambda view: state.engine.forward_online(view, [])[0])
    with frozen_running_stats(state.engine.online):
        z = [embed(batch.large[0]) for batch in batches]
    bank = FeatureBank(len(z), len(z[0]), z[0].shape[1], z[0].device)
    for features in z:
        bank.push(features)
    state.groups.start_from(bank)


def start_or_save(state: TrainState, batches: Iterable[Batch], checkpoints: Checkpoints) -> None:
    """`start_groups`; a run that is stopped in it has its checkpoint too, of step 0.

    The nets stay as they are, so it begins anew from there.
    """
    try:
        start_groups(state, batches)
    except phases.StopRequested:
        checkpoints.save(0, state.state_dict())
        if problem := checkpoints.wait():
            raise UserError(problem) from None
        raise


def build_probe(recipe: Recipe, device: torch.device) -> KnnProbe | None:
    """The kNN judge; None, and a word on the console, where the dataset cannot be judged on."""
    try:
        return KnnProbe(recipe.data, recipe.evaluation, device)
    except UserError as error:
        if distributed.is_main():
            print(f"no kNN: {error}", flush=True)
        return None


def build_online_probe(state: TrainState, dataset: TarDataset, path: str) -> OnlineProbe:
    """The judge of the views in training.

    Raises:
        UserError: the images have no labels.
    """
    require_labels(dataset, path, "evaluation.online")
    backbone, device = state.engine.online.backbone, state.engine.device
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    return OnlineProbe(backbone, num_features, dataset.num_classes, device)


def conclude(
    recipe: Recipe,
    state: TrainState,
    dataset: TarDataset,
    probe: KnnProbe | None,
    metrics: Metrics,
) -> None:
    """Judges the finished run once, writes results.json and the picture, prints the table."""
    run_dir = Path(recipe.run.dir)
    results = distributed.broadcast_object(run_folder.read_results(run_dir))
    if results.get("run", {}).get("step") != state.step:
        usage = state.usage.counts()
        results = {
            "run": {"step": state.step},
            "groups": {
                "perplexity": perplexity(usage),
                "in_use": int((usage > 0).sum()),
                "num_groups": recipe.grouping.num_groups,
            },
        }
        if probe:
            results["knn"] = _knn_figures(recipe, state, probe)
        _draw_groups(recipe, state, dataset, usage)
        run_folder.add_results(run_dir, results)
    metrics.say(_result_table(recipe, results))


def _draw_groups(recipe: Recipe, state: TrainState, dataset: TarDataset, usage: Tensor) -> None:
    # Shards are shuffled, so the first images are a fair sample. Never more than were trained on:
    # a run of a few steps must not end with a longer evaluation.
    num_trained = state.step * recipe.data.global_batch
    ids = np.arange(min(NUM_PICTURED, num_trained, dataset.num_samples))
    engine = state.engine
    z = embed_images(
        stoppable(engine.project), recipe.data, recipe.evaluation, dataset, ids, engine.device
    )
    if distributed.is_main():
        path = Path(recipe.run.dir) / PICTURE_FILE
        draw_groups(path, dataset, ids, z, state.groups.centroids, usage)


def _knn_figures(recipe: Recipe, state: TrainState, probe: KnnProbe) -> dict[str, float]:
    figures = {"trained": probe.accuracy(stoppable(state.engine.embed)), **probe.settings}
    if recipe.evaluation.baselines:
        torch.manual_seed(recipe.run.seed)
        random_net = build_nets(recipe.model)[0].backbone.to(state.engine.device).eval()
        with torch.no_grad():
            figures["random"] = probe.accuracy(stoppable(random_net))
        figures["raw_pixels"] = probe.accuracy(stoppable(lambda images: images.flatten(1)))
    return figures


def _result_table(recipe: Recipe, results: dict[str, dict[str, float]]) -> str:
    run_dir, groups, knn = Path(recipe.run.dir), results["groups"], results.get("knn", {})
    rows = [
        (f"kNN top-1, {name}", f"{knn[key]:.3f}")
        for key, name in (
            ("raw_pixels", "raw pixels"),
            ("random", "random net"),
            ("trained", "trained net"),
        )
        if key in knn
    ]
    rows += [
        ("groups in use", f"{groups['in_use']} of {groups['num_groups']}"),
        ("group perplexity", f"{groups['perplexity']:.1f}"),
        ("peak memory of a rank", f"{distributed.peak_memory_mib():.0f} MiB"),
        ("results", str(run_dir / run_folder.RESULTS_FILE)),
        ("TensorBoard log", str(run_dir / "tensorboard")),
        ("checkpoint", str(checkpoint.list_checkpoints(run_dir)[-1])),
        ("picture of the groups", str(run_dir / PICTURE_FILE)),
        ("picture of the course", str(run_dir / CURVES_FILE)),
    ]
    return "\n".join(["", *(f"  {name:<24}{value}" for name, value in rows)])


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe, parameter counts, memory plan, steps and epochs, as text.

    Raises:
        UserError: the dataset, the number of ranks or the file of first weights does not fit.
    """
    if recipe.model.weights:
        first_nets(recipe.model)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dataset = TarDataset(recipe.data.path, "train")
    recipe, _ = fit_to_data(recipe, dataset.num_samples)
    plan, schedules = plan_steps(recipe, dataset)
    batch = len(plan.ids(0, 0, world_size))
    memory = plan_memory(recipe, world_size)
    epochs = schedules.num_steps / schedules.steps_per_epoch
    rows = [
        ("backbone parameters", f"{memory.num_backbone_parameters / 1e6:.2f} M"),
        ("trained parameters", f"{memory.num_online_parameters / 1e6:.2f} M, heads included"),
        ("images", f"{dataset.num_samples}"),
        ("steps", f"{schedules.num_steps} ({epochs:.2f} epochs)"),
        ("batch", f"{recipe.data.global_batch} = {world_size} rank(s) x {batch}"),
        ("peak learning rate", f"{schedules.peak_lr:g} after {schedules.warmup_steps} steps"),
        ("memory of a rank", f"{memory.total_mib:.0f} MiB, libraries' buffers not counted"),
        ("  weights, gradients", f"{memory.weights_and_gradients_mib:.0f} MiB"),
        ("  momentum net", f"{memory.momentum_net_mib:.0f} MiB"),
        ("  optimizer", f"{memory.optimizer_mib:.0f} MiB"),
        ("  activations", f"{memory.activations_mib:.0f} MiB"),
        ("  groups and bank", f"{memory.groups_and_bank_mib:.0f} MiB"),
    ]
    return dump_recipe(recipe) + "\n" + "\n".join(f"{name:<24}{value}" for name, value in rows)
