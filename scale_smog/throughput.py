"""Profiles a recipe's step on the ranks at hand and predicts it for many GPUs."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import num_images
from scale_smog.data.loaders.build import build_plan, build_training_loader, open_together
from scale_smog.data.loaders.synthetic import SyntheticLoader
from scale_smog.data.plan import images_per_rank
from scale_smog.data.remote.space import use_cache
from scale_smog.grouping import spherical_kmeans
from scale_smog.loop import train_step
from scale_smog.profiling import report
from scale_smog.profiling.hardware import Hardware, hardware_name, load_hardware
from scale_smog.profiling.link_benchmark import calibrated
from scale_smog.profiling.peaks import measure_peaks
from scale_smog.profiling.scaling_model import Measured, whole_parts
from scale_smog.profiling.step_profile import StepProfile, TimedMethod, Timeline, timed
from scale_smog.profiling.timing import synchronize
from scale_smog.profiling.traces import communication, tracing, write_trace
from scale_smog.profiling.workload import Workload
from scale_smog.schedules import ScheduledValues
from scale_smog.small_data import fit_to_data
from scale_smog.state import TrainState, build_state

DEFAULT_TARGET = "h200"
NUM_TRACED = 2
LINKS = {"gpus_per_node", "node", "network", "collective_shares"}  # what calibration changes
KMEANS_ROWS_ON_CPU = 4096  # more would take long; the time grows with the rows
# Of a step well after what a method does in its first epochs only.
FIXED_VALUES = ScheduledValues(epoch=1e6, progress=0.0, lr=1e-3, weight_decay=1e-6, beta=0.99)


@dataclass(frozen=True)
class Options:
    """What the program's flags say."""

    num_steps: int = 20
    num_warm_up: int = 3
    synthetic: bool = False  # random views in place of the loader's
    loader_only: bool = False  # no nets
    trace: bool = True
    calibrate: bool = False  # measure the links between these ranks and predict with them
    hardware: str = ""  # file or name of the machine to predict for; default: this one


def profile(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Profiles on all ranks of the launcher; returns what `profile.json` holds.

    Raises:
        UserError: the dataset, the hardware file or the number of ranks does not fit.
    """
    with distributed.process_group() as device:
        return profile_on(device, recipe, options)


def profile_on(device: torch.device, recipe: Recipe, options: Options) -> dict[str, Any]:
    """As `profile`, on a rank whose process group is there."""
    target = load_hardware(options.hardware or hardware_name(device) or DEFAULT_TARGET)
    if options.synthetic:
        recipe = recipe.with_values("data", loader="synthetic")
    num = recipe.data.num_images
    if recipe.data.loader != "synthetic":
        use_cache(recipe.data.cache_dir, recipe.data.cache_gib)
        num = num_images(recipe.data.path, "train")
    recipe, _ = fit_to_data(recipe, num)
    measure = profile_loader if options.loader_only else profile_step
    facts, text = measure(recipe, options, device, target)
    _write(facts, text, Path(recipe.run.dir))
    return facts


def profile_loader(
    recipe: Recipe, options: Options, device: torch.device, _target: Hardware
) -> tuple[dict[str, Any], str]:
    """Figures of the loader alone, and the same as text."""
    num_batches = options.num_warm_up + options.num_steps
    batch = images_per_rank(recipe.data.global_batch, distributed.world_size())
    iterator = iter(build_batches(recipe, batch, num_batches, options.synthetic, device))
    for _ in islice(iterator, options.num_warm_up):
        pass
    synchronize(device)
    start = time.perf_counter()
    num = sum(1 for _ in islice(iterator, options.num_steps))
    synchronize(device)  # a loader on the GPU has only asked for its last batches
    seconds = (time.perf_counter() - start) / max(1, num)
    facts: dict[str, Any] = {
        "loader": recipe.data.loader,
        "images_per_s": recipe.data.global_batch / seconds,
        "batch_s": seconds,
    }
    return facts, report.loader_text(facts)


def profile_step(
    recipe: Recipe, options: Options, device: torch.device, target: Hardware
) -> tuple[dict[str, Any], str]:
    """Figures of the loop's step and what they predict for the target, and the same as text."""
    folder = Path(recipe.run.dir)
    batch = images_per_rank(recipe.data.global_batch, distributed.world_size())
    num_batches = options.num_warm_up + options.num_steps + NUM_TRACED
    batches = iter(build_batches(recipe, batch, num_batches, options.synthetic, device))
    state = build_state(without_resets(recipe), batch, device)
    measured = measure_steps(state, batches, options, device, folder)
    measured = measured.with_kmeans(kmeans_s(recipe, batch, device))
    work = Workload.of(recipe, batch)
    if options.calibrate:
        target = calibrated(target, device)
    facts = report.facts(recipe, measured, work, _device_facts(recipe, device))
    knows_waits = options.trace or distributed.world_size() == 1
    if not knows_waits:  # they are in the parts that waited
        facts["communication"] = dict.fromkeys(facts["communication"])
    if distributed.is_main():
        basis = _basis(recipe, measured, work, device) if knows_waits else None
        facts |= report.predictions(recipe, target, batch, basis, folder)
        if options.calibrate:
            facts["measured_links"] = target.model_dump(include=LINKS)
    return facts, report.text(facts)


def _basis(
    recipe: Recipe, measured: StepProfile, work: Workload, device: torch.device
) -> Measured | None:
    """What predictions start from; None: the roof.

    Parts measured on a CPU, or on a GPU that no file describes, say nothing of another machine.
    """
    name = hardware_name(device)
    if name is None:
        return None
    ranks, per_node = distributed.world_size(), distributed.ranks_per_node()
    parts = whole_parts(measured.parts, recipe.engine.kind, ranks, per_node)
    return Measured(work, parts, load_hardware(name))


def _write(facts: dict[str, Any], text: str, folder: Path) -> None:
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(text + f"\nwritten to {folder / 'profile.json'}", flush=True)


def build_batches(
    recipe: Recipe, batch: int, num: int, synthetic: bool, device: torch.device
) -> Iterable[Batch]:
    """The recipe's loader, or random views, which need no dataset."""
    views = training_views(recipe.data, recipe.augment)
    if synthetic or recipe.data.loader == "synthetic":
        return SyntheticLoader(views, batch, num, device)
    dataset = open_together(recipe.data.path, "train")
    plan = build_plan(recipe.data, dataset, recipe.run.seed)
    return build_training_loader(recipe.data, views, dataset, plan, range(num), device)


def timed_methods(state: TrainState) -> list[TimedMethod]:
    """What a step calls, and which part it belongs to: what is not the engine's is `grouping`."""
    return [
        TimedMethod(state.method, "train_step", "grouping"),
        TimedMethod(state.engine, "update_ema", "ema"),
        TimedMethod(state.engine, "reset_momentum", "ema"),
        TimedMethod(state.engine, "forward_online", "online_forward"),
        TimedMethod(state.engine, "forward_momentum", "momentum_forward"),
        TimedMethod(state.engine, "backward", "backward"),
        TimedMethod(state.engine, "step", "optimizer"),
    ]


def measure_steps(
    state: TrainState,
    batches: Iterator[Batch],
    options: Options,
    device: torch.device,
    folder: Path,
) -> StepProfile:
    """Runs the loop's own step: warm-up, then timed steps, then a few traced ones."""
    for batch in islice(batches, options.num_warm_up):
        train_step(state, batch, FIXED_VALUES)
    timeline = Timeline(device)
    with timed(timeline, timed_methods(state)):
        _run(state, batches, options.num_steps, timeline)
        measured = StepProfile.of(timeline.durations())
        if not options.trace:
            return measured
        # On a GPU kernels belong to the part whose thread starts them: autograd's has none.
        own_thread = torch.autograd.set_multithreading_enabled(device.type != "cuda")
        with tracing(device) as profiler, own_thread:
            _run(state, batches, NUM_TRACED, timeline)
    write_trace(profiler, folder / "trace", distributed.rank())
    if distributed.world_size() == 1:
        return measured
    return measured.with_communication(communication(profiler, device.type == "cuda"))


def without_resets(recipe: Recipe) -> Recipe:
    """So that measured steps are alike, and the run's usual ones; k-means is measured by itself."""
    return recipe.with_values(
        "grouping", reset_every=10**9, bank_steps=recipe.bank_steps, instance_warmup_steps=0
    )


def _run(state: TrainState, batches: Iterator[Batch], num: int, timeline: Timeline) -> None:
    for _ in range(num):
        with timeline.step():
            with timeline.part("data_wait"):
                batch = next(batches)
            train_step(state, batch, FIXED_VALUES)


def kmeans_s(recipe: Recipe, batch: int, device: torch.device) -> float:
    """Seconds a step that a reset's k-means costs, spread over the steps between resets.

    On random features, which move from group to group until the last round. On a CPU fewer than
    the bank's are clustered and the time is scaled up.
    """
    grouping = recipe.grouping
    if not recipe.kmeans_every:
        return 0.0
    bank_rows = recipe.num_kept_features(batch)
    rows = bank_rows if device.type == "cuda" else min(bank_rows, KMEANS_ROWS_ON_CPU)
    generator = torch.Generator(device).manual_seed(distributed.rank())
    features = torch.randn(rows, recipe.model.dim, device=device, generator=generator)
    features = F.normalize(features)
    start = features[torch.arange(grouping.num_groups, device=device) % rows].clone()
    seconds = []
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        spherical_kmeans(features, start, iterations=grouping.kmeans_iterations)  # ends with .item
        seconds.append(time.perf_counter() - begin)
    return seconds[-1] * bank_rows / rows / recipe.kmeans_every


def _device_facts(recipe: Recipe, device: torch.device) -> report.DeviceFacts:
    flops_per_s, bytes_per_s = _peaks(recipe, device)
    return report.DeviceFacts(
        name=_device_name(device),
        num_ranks=distributed.world_size(),
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        memory_mib=distributed.peak_memory_mib(),
        memory_share=_memory_share(device),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peaks(recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Peak arithmetic and bandwidth of the device at hand: its data sheet's, else measured."""
    name, precision = hardware_name(device), recipe.engine.precision
    if name:
        machine: Hardware = load_hardware(name)
        return machine.flops_per_s(precision), machine.bytes_per_s
    return measure_peaks(device, precision)


def _memory_share(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_reserved(device) / torch.cuda.mem_get_info(device)[1]
