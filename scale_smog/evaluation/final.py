"""The end of a run: one evaluation, results.json, the picture of the groups, the table."""

from functools import partial
from pathlib import Path

import torch

from scale_smog import checkpoint, distributed
from scale_smog.config import Recipe
from scale_smog.data.datasets import Images
from scale_smog.evaluation.features import embed_images, random_backbone, raw_pixels
from scale_smog.evaluation.groups.gallery import write_gallery
from scale_smog.evaluation.groups.pictures import NUM_PICTURED, draw_groups
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.splits import random_subset
from scale_smog.grouping import perplexity
from scale_smog.methods import GroupMethod
from scale_smog.reporting import run_folder
from scale_smog.reporting.metrics import Metrics
from scale_smog.runtime import run_layout
from scale_smog.runtime.phases import stoppable
from scale_smog.state import TrainState


def conclude(
    recipe: Recipe,
    state: TrainState,
    dataset: Images,
    knn: KnnProbe | None,
    metrics: Metrics,
) -> None:
    """Evaluates the finished run once, writes results.json and the picture, prints the table.

    Raises:
        StopRequested: on all ranks alike.
    """
    run_dir = Path(recipe.run.dir)
    results = distributed.broadcast_object(run_folder.read_results(run_dir))
    if results.get("run", {}).get("step") != state.step:
        metrics.say("trained; evaluating what it has learnt")
        results: dict[str, dict[str, float]] = {"run": {"step": state.step}}
        method = state.method
        if isinstance(method, GroupMethod):
            usage = method.usage.counts()
            results["groups"] = {
                "perplexity": perplexity(usage),
                "in_use": int((usage > 0).sum()),
                "num_groups": len(usage),
            }
            _draw_groups(recipe, state, method, dataset)
        if knn:
            results["knn"] = _knn_results(recipe, state, knn)
        run_folder.add_results(run_dir, results)
    metrics.say(_table(run_dir, results))


def _draw_groups(recipe: Recipe, state: TrainState, method: GroupMethod, dataset: Images) -> None:
    # Never more than were trained on: a run of a few steps must not end with a longer evaluation.
    num_trained = state.step * recipe.data.global_batch
    ids = random_subset(dataset.num_samples, min(NUM_PICTURED, num_trained))
    engine = state.engine
    z = embed_images(
        stoppable(engine.project), recipe.data, recipe.evaluation, dataset, ids, engine.device
    )
    centroids = method.centroids()
    if distributed.is_main():
        run_dir, usage = Path(recipe.run.dir), method.usage.counts().cpu()
        draw_groups(run_dir / run_layout.GROUPS_PICTURE, dataset, ids, z, centroids, usage)
        write_gallery(run_dir / run_layout.GALLERY_FILE, dataset, ids, z, centroids, usage)


def _knn_results(recipe: Recipe, state: TrainState, knn: KnnProbe) -> dict[str, float]:
    embed = stoppable(partial(state.engine.embed, of=recipe.evaluation.net))
    results = {"trained": knn.accuracy(embed), **knn.settings}
    if recipe.evaluation.baselines:
        random_net = random_backbone(recipe.model, recipe.run.seed)
        random_net.to(state.engine.device).eval()
        with torch.no_grad():
            results["random"] = knn.accuracy(stoppable(random_net))
        results["raw_pixels"] = knn.accuracy(stoppable(raw_pixels))
    return results


def _table(run_dir: Path, results: dict[str, dict[str, float]]) -> str:
    groups, knn = results.get("groups"), results.get("knn", {})
    names = {"raw_pixels": "raw pixels", "random": "random net", "trained": "trained net"}
    rows = [(f"kNN top-1, {names[key]}", f"{knn[key]:.3f}") for key in names if key in knn]
    if groups:
        rows += [
            ("groups in use", f"{groups['in_use']} of {groups['num_groups']}"),
            ("group perplexity", f"{groups['perplexity']:.1f}"),
            ("picture of the groups", str(run_dir / run_layout.GROUPS_PICTURE)),
        ]
    rows += [
        ("peak memory of a rank", f"{distributed.peak_memory_mib():.0f} MiB"),
        ("results", str(run_dir / run_layout.RESULTS_FILE)),
        ("TensorBoard log", str(run_dir / run_layout.BOARD_FOLDER)),
        ("checkpoint", str(checkpoint.list_checkpoints(run_dir)[-1])),
        ("training curves", str(run_dir / run_layout.CURVES_FILE)),
    ]
    lines = ["", *(f"  {name:<24}{value}" for name, value in rows), *verdict(knn)]
    return "\n".join(lines)


def verdict(knn: dict[str, float]) -> list[str]:
    """A line on a net that has learnt nothing, where baselines show it."""
    baselines = [knn[name] for name in ("raw_pixels", "random") if name in knn]
    if not baselines or knn["trained"] > max(baselines) or knn["trained"] == 1:
        return []
    return ["", "kNN no better than a baseline's: docs/learning.md, 'When it collapses'"]
