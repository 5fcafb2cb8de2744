"""The evaluations as programs: a checkpoint in, a table and results.json out."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.evaluation.feature_files import write_features
from scale_smog.evaluation.groups.program import evaluate_groups
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.paper import ImageCounts, Ours, compare
from scale_smog.evaluation.supervised.finetune import evaluate_finetuned
from scale_smog.evaluation.supervised.label_subsets import labelled_samples
from scale_smog.evaluation.supervised.linear import evaluate_linear
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.reporting import run_folder


def _knn(task: EvaluationTask) -> Results:
    recipe = task.recipe
    probe = KnnProbe(recipe.data, recipe.evaluation, task.device)
    results: Results = {}
    for name, encoder in task.frozen_encoders().items():
        results[name], results[f"{name}_top5"] = probe.accuracies(encoder)
    if recipe.evaluation.baselines:
        results["raw_pixels"] = probe.accuracy(lambda images: images.flatten(1))
    return results | probe.settings


def _linear(task: EvaluationTask) -> Results:
    train_set, test_set = task.labelled_splits()
    by_net = {
        name: evaluate_linear(task, name, encoder, train_set, test_set)
        for name, encoder in task.frozen_encoders().items()
    }
    return by_net["trained"] | {"setting": task.protocols.linear.setting} | _baseline(by_net)


def _finetune(task: EvaluationTask) -> Results:
    train_set, test_set = task.labelled_splits()
    by_net = {
        name: evaluate_finetuned(task, name, net, train_set, test_set)
        for name, net in task.backbones().items()
    }
    return by_net["trained"] | {"share": task.protocols.finetune.share} | _baseline(by_net)


def _segmentation(task: EvaluationTask) -> Results:
    from scale_smog.evaluation.dense.segmentation import evaluate_segmentation

    return evaluate_segmentation(task)


def _detection(task: EvaluationTask) -> Results:
    from scale_smog.evaluation.dense.detection import evaluate_detection

    return evaluate_detection(task)


def _baseline(by_net: dict[str, Results]) -> Results:
    random = by_net.get("random", {})
    return {f"random_{key}": random[key] for key in ("top1", "top5") if key in random}


EVALUATORS: dict[str, Callable[[EvaluationTask], Results]] = {
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
        task = _prepared(EvaluationTask.open(name, paths[0], overrides, device))
        results, counts = EVALUATORS[name](task), _COUNTS.get(name, _labelled_counts)(task)
        task.finish(results, {"image_counts": asdict(counts)})
        if distributed.is_main():
            print(_table(task, results))
            if with_paper:
                print(_comparison(task, results, counts))


def _prepared(task: EvaluationTask) -> EvaluationTask:
    """The task with all that its result depends on; says early what is wrong with its images."""
    settings = {"evaluation": task.recipe.evaluation.model_dump()}
    if task.name in type(task.protocols).model_fields:
        settings[task.name] = getattr(task.protocols, task.name).model_dump()
    hashes = _HASHES.get(task.name, _labelled_hashes)
    return replace(task, settings=settings, data_sha256=hashes(task))


def _labelled_hashes(task: EvaluationTask) -> dict[str, str]:
    task.labelled_splits()
    return task.labelled_hashes()


def _finetune_hashes(task: EvaluationTask) -> dict[str, str]:
    train_set, _ = task.labelled_splits()
    ids = labelled_samples(task.protocols.finetune, train_set)
    return task.labelled_hashes() | {"labelled_ids": hashlib.sha256(ids.tobytes()).hexdigest()}


def _segmentation_hashes(task: EvaluationTask) -> dict[str, str]:
    from scale_smog.evaluation.dense.segmentation import segmentation_hashes

    return segmentation_hashes(task)


def _detection_hashes(task: EvaluationTask) -> dict[str, str]:
    from scale_smog.evaluation.dense.detection import detection_hashes

    return detection_hashes(task)


_HASHES = {
    "finetune": _finetune_hashes,
    "segmentation": _segmentation_hashes,
    "detection": _detection_hashes,
}


def _table(task: EvaluationTask, results: Results) -> str:
    shown = {k: v for k, v in results.items() if isinstance(v, str | int | float)}
    rows = [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in shown.items()]
    rows.append(("results", str(task.folder / run_folder.RESULTS_FILE)))
    return "\n".join([f"{task.name} of {task.checkpoint}", *(f"  {k:<20}{v}" for k, v in rows)])


def _comparison(task: EvaluationTask, results: Results, counts: ImageCounts) -> str:
    model, protocols = task.recipe.model, task.protocols
    ours = Ours(
        evaluation=task.name,
        backbone=model.backbone,
        width=model.width,
        epochs=task.recipe.run.epochs,
        batch=task.recipe.data.global_batch,
        num_small_crops=task.recipe.data.num_small_crops,
        share=protocols.finetune.share,
        dataset=protocols.segmentation.setting,
        images=counts,
        results=results,
    )
    return compare(ours)


def _labelled_counts(task: EvaluationTask) -> ImageCounts:
    train, test = task.labelled_splits()
    num_test = min(task.recipe.evaluation.num_test_images or test.num_samples, test.num_samples)
    return ImageCounts(train.num_classes, train.num_samples, num_test)


def _segmentation_counts(task: EvaluationTask) -> ImageCounts:
    from scale_smog.evaluation.dense.segmentation_data import open_segmentation

    config = task.protocols.segmentation
    train, test = (open_segmentation(config, x) for x in (config.train_split, config.val_split))
    return ImageCounts(train.num_classes, len(train.pairs), len(test.pairs))


def _detection_counts(task: EvaluationTask) -> ImageCounts:
    from scale_smog.evaluation.dense.detection_data import open_detection

    config = task.protocols.detection
    train, test = (open_detection(config, x) for x in (config.train_split, config.val_split))
    return ImageCounts(len(train.categories), len(train.ids), len(test.ids))


_COUNTS = {"segmentation": _segmentation_counts, "detection": _detection_counts}


PROGRAMS: dict[str, Callable[[Sequence[str], Iterable[str], bool], None]] = {
    **{name: partial(evaluate, name) for name in EVALUATORS},
    "groups": evaluate_groups,
    "features": write_features,
}
