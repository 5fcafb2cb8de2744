"""The evaluations as programs: a checkpoint in, a table and results.json out."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.evaluation.feature_files import write_features
from scale_smog.evaluation.groups.program import evaluate_groups
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.paper import compare, paper_table
from scale_smog.evaluation.supervised.finetune import chosen_samples, evaluate_finetuned
from scale_smog.evaluation.supervised.linear import evaluate_linear
from scale_smog.reporting import run_folder

Figures = dict[str, Any]


def _knn(job: Job) -> Figures:
    recipe = job.recipe
    probe = KnnProbe(recipe.data, recipe.evaluation, job.device)
    figures: Figures = {}
    for name, embed in job.embeds().items():
        figures[name], figures[f"{name}_top5"] = probe.accuracies(embed)
    if recipe.evaluation.baselines:
        figures["raw_pixels"] = probe.accuracy(lambda images: images.flatten(1))
    return figures | probe.settings


def _linear(job: Job) -> Figures:
    train_set, test_set = job.labelled_splits()
    own = {
        name: evaluate_linear(job, name, embed, train_set, test_set)
        for name, embed in job.embeds().items()
    }
    return own["trained"] | {"setting": job.protocols.linear.setting} | _baseline(own)


def _finetune(job: Job) -> Figures:
    train_set, test_set = job.labelled_splits()
    nets = job.backbones()
    own = {
        name: evaluate_finetuned(job, name, net, train_set, test_set) for name, net in nets.items()
    }
    return own["trained"] | {"share": job.protocols.finetune.share} | _baseline(own)


def _segmentation(job: Job) -> Figures:
    from scale_smog.evaluation.dense.segmentation import evaluate_segmentation

    return evaluate_segmentation(job)


def _detection(job: Job) -> Figures:
    from scale_smog.evaluation.dense.detection import evaluate_detection

    return evaluate_detection(job)


def _baseline(own: dict[str, Figures]) -> Figures:
    random = own.get("random", {})
    return {f"random_{key}": random[key] for key in ("top1", "top5") if key in random}


EVALUATORS: dict[str, Callable[[Job], Figures]] = {
    "knn": _knn,
    "linear": _linear,
    "finetune": _finetune,
    "segmentation": _segmentation,
    "detection": _detection,
}


def evaluate(
    name: str, paths: Sequence[str], overrides: Iterable[str], with_paper: bool = False
) -> None:
    """Runs one evaluation on one checkpoint, prints its table and keeps its results.

    Args:
        name: a key of `EVALUATORS`.
        paths: the checkpoint or the run.
        overrides: `section.key=value`, of the run's recipe and of the protocols.
        with_paper: print the paper's rows beside ours.

    Raises:
        UserError: the checkpoint, the dataset or a setting does not fit; on every rank.
    """
    if len(paths) != 1:
        raise UserError(f"{name} takes one checkpoint, not {len(paths)}")
    with distributed.process_group() as device:
        job = _prepared(Job.open(name, paths[0], overrides, device))
        figures = EVALUATORS[name](job)
        job.finish(figures)
        if distributed.is_main():
            print(_table(job, figures))
            if with_paper:
                print(_comparison(job, figures))


def _prepared(job: Job) -> Job:
    """The job with all that its result depends on; says early what is wrong with its images."""
    settings = {"evaluation": job.recipe.evaluation.model_dump()}
    if job.name in type(job.protocols).model_fields:
        settings[job.name] = getattr(job.protocols, job.name).model_dump()
    hashes = _HASHES.get(job.name, _labelled_hashes)
    return replace(job, settings=settings, data_sha256=hashes(job))


def _labelled_hashes(job: Job) -> dict[str, str]:
    job.labelled_splits()
    return job.labelled_hashes()


def _finetune_hashes(job: Job) -> dict[str, str]:
    train_set, _ = job.labelled_splits()
    ids = chosen_samples(job.protocols.finetune, train_set)
    return job.labelled_hashes() | {"labelled_ids": hashlib.sha256(ids.tobytes()).hexdigest()}


def _segmentation_hashes(job: Job) -> dict[str, str]:
    from scale_smog.evaluation.dense.segmentation import segmentation_hashes

    return segmentation_hashes(job)


def _detection_hashes(job: Job) -> dict[str, str]:
    from scale_smog.evaluation.dense.detection import detection_hashes

    return detection_hashes(job)


_HASHES = {
    "finetune": _finetune_hashes,
    "segmentation": _segmentation_hashes,
    "detection": _detection_hashes,
}


def _table(job: Job, figures: Figures) -> str:
    shown = {k: v for k, v in figures.items() if isinstance(v, str | int | float)}
    rows = [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in shown.items()]
    rows.append(("results", str(job.folder / run_folder.RESULTS_FILE)))
    return "\n".join([f"{job.name} of {job.checkpoint}", *(f"  {k:<20}{v}" for k, v in rows)])


def _comparison(job: Job, figures: Figures) -> str:
    model, protocols = job.recipe.model, job.protocols
    table = paper_table(
        job.name,
        model.backbone,
        model.width,
        protocols.finetune.share,
        protocols.segmentation.setting,
    )
    if table is None:
        return f"the paper has no table for {job.name}"
    images = {"segmentation": protocols.segmentation.path, "detection": protocols.detection.path}
    shown = Path(images.get(job.name, job.recipe.data.path)).name
    return compare(table, f"ours: {model.backbone} on {shown}", figures)


PROGRAMS: dict[str, Callable[[Sequence[str], Iterable[str], bool], None]] = {
    **{name: partial(evaluate, name) for name in EVALUATORS},
    "groups": evaluate_groups,
    "features": write_features,
}
