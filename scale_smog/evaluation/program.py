"""The evaluations as programs: a checkpoint in, a table and results.json out."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.evaluation.feature_files import write_features
from scale_smog.evaluation.features import raw_pixels
from scale_smog.evaluation.groups.program import evaluate_groups
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.paper import ImageCounts, Ours, compare
from scale_smog.evaluation.supervised.finetune import evaluate_finetuned, with_batch_of_labels
from scale_smog.evaluation.supervised.label_subsets import labelled_samples
from scale_smog.evaluation.supervised.linear import evaluate_linear
from scale_smog.evaluation.task import EvaluationTask, Results
from scale_smog.runtime import run_layout

# The images of the splits in use, by the splits' names, as the evaluation reads them; opened once.
Splits = dict[str, Any]


class Evaluator(NamedTuple):
    """The parts of an evaluation."""

    open_splits: Callable[[EvaluationTask], Splits]
    evaluate: Callable[[EvaluationTask, Splits], Results]
    image_counts: Callable[[EvaluationTask, Splits], ImageCounts]


def _knn(task: EvaluationTask, splits: Splits) -> Results:
    recipe = task.recipe
    train, _ = splits.values()
    probe = KnnProbe(recipe.data, recipe.evaluation, task.device, train)
    results: Results = {}
    for name, encoder in task.frozen_encoders().items():
        results[name], results[f"{name}_top5"] = probe.accuracies(encoder)
    if recipe.evaluation.baselines:
        results["raw_pixels"] = probe.accuracy(raw_pixels)
    return results | probe.settings


def _linear(task: EvaluationTask, splits: Splits) -> Results:
    train_set, test_set = splits.values()
    by_net = {
        name: evaluate_linear(task, name, encoder, train_set, test_set)
        for name, encoder in task.frozen_encoders().items()
    }
    return by_net["trained"] | {"setting": task.protocols.linear.setting} | _baseline(by_net)


def _finetune(task: EvaluationTask, splits: Splits) -> Results:
    train_set, test_set = splits.values()
    by_net = {
        name: evaluate_finetuned(task, name, net, train_set, test_set)
        for name, net in task.backbones().items()
    }
    return by_net["trained"] | {"share": task.protocols.finetune.share} | _baseline(by_net)


def _baseline(by_net: dict[str, Results]) -> Results:
    random = by_net.get("random", {})
    return {f"random_{key}": random[key] for key in ("top1", "top5") if key in random}


def _labelled_counts(task: EvaluationTask, splits: Splits) -> ImageCounts:
    train, test = splits.values()
    num_test = min(task.recipe.evaluation.num_test_images or test.num_samples, test.num_samples)
    return ImageCounts(train.num_classes, train.num_samples, num_test)


def _segmentation_splits(task: EvaluationTask) -> Splits:
    from scale_smog.evaluation.dense.segmentation_data import open_segmentation

    config = task.protocols.segmentation
    names = config.train_split, config.val_split
    return {name: open_segmentation(config, name) for name in names}


def _segmentation(task: EvaluationTask, splits: Splits) -> Results:
    from scale_smog.evaluation.dense.segmentation import evaluate_segmentation

    config = task.protocols.segmentation
    return evaluate_segmentation(task, splits[config.train_split], splits[config.val_split])


def _segmentation_counts(task: EvaluationTask, splits: Splits) -> ImageCounts:
    config = task.protocols.segmentation
    train, test = splits[config.train_split], splits[config.val_split]
    return ImageCounts(train.num_classes, len(train.pairs), len(test.pairs))


def _detection_splits(task: EvaluationTask) -> Splits:
    from scale_smog.evaluation.dense.detection_data import open_detection

    config = task.protocols.detection
    names = config.train_split, config.val_split
    return {name: open_detection(config, name) for name in names}


def _detection(task: EvaluationTask, splits: Splits) -> Results:
    from scale_smog.evaluation.dense.detection import evaluate_detection

    config = task.protocols.detection
    return evaluate_detection(task, splits[config.train_split], splits[config.val_split])


def _detection_counts(task: EvaluationTask, splits: Splits) -> ImageCounts:
    config = task.protocols.detection
    train, test = splits[config.train_split], splits[config.val_split]
    return ImageCounts(len(train.categories), len(train.ids), len(test.ids))


EVALUATORS = {
    "knn": Evaluator(EvaluationTask.labelled_splits, _knn, _labelled_counts),
    "linear": Evaluator(EvaluationTask.labelled_splits, _linear, _labelled_counts),
    "finetune": Evaluator(EvaluationTask.labelled_splits, _finetune, _labelled_counts),
    "segmentation": Evaluator(_segmentation_splits, _segmentation, _segmentation_counts),
    "detection": Evaluator(_detection_splits, _detection, _detection_counts),
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
    evaluator = EVALUATORS[name]
    with distributed.process_group() as device:
        task = EvaluationTask.open(name, paths[0], overrides, device)
        splits = evaluator.open_splits(task)
        task = _prepared(task, splits)
        if distributed.is_main():
            print(f"{name} of {task.checkpoint}, images of {', '.join(splits)}", flush=True)
        results, counts = evaluator.evaluate(task, splits), evaluator.image_counts(task, splits)
        task.finish(results, {"image_counts": asdict(counts)})
        if distributed.is_main():
            print(_table(task, results))
            if with_paper:
                print(_comparison(task, results, counts))


def _prepared(task: EvaluationTask, splits: Splits) -> EvaluationTask:
    """The task with all that its result depends on."""
    hashes = distributed.call_on_main(lambda: {name: x.sha256 for name, x in splits.items()})
    if task.name == "finetune":
        config = task.protocols.finetune
        ids = labelled_samples(config, splits["train"])
        config = with_batch_of_labels(config, len(ids))
        task = replace(task, protocols=task.protocols.model_copy(update={"finetune": config}))
        hashes["labelled_ids"] = hashlib.sha256(ids.tobytes()).hexdigest()
    settings = {"evaluation": task.recipe.evaluation.model_dump()}
    if task.name in type(task.protocols).model_fields:
        settings[task.name] = getattr(task.protocols, task.name).model_dump()
    return replace(task, settings=settings, data_sha256=hashes)


def _table(task: EvaluationTask, results: Results) -> str:
    shown = {k: v for k, v in results.items() if isinstance(v, str | int | float)}
    rows = [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in shown.items()]
    rows.append(("results", str(task.folder / run_layout.RESULTS_FILE)))
    return "\n".join([f"{task.name} of {task.checkpoint}", *(f"  {k:<20}{v}" for k, v in rows)])


def _comparison(task: EvaluationTask, results: Results, counts: ImageCounts) -> str:
    protocols = task.protocols
    ours = Ours.of_run(
        task.recipe,
        task.step,
        evaluation=task.name,
        share=protocols.finetune.share,
        dataset=protocols.segmentation.setting,
        images=counts,
        results=results,
    )
    return compare(ours)


PROGRAMS: dict[str, Callable[[Sequence[str], Iterable[str], bool], None]] = {
    **{name: partial(evaluate, name) for name in EVALUATORS},
    "groups": evaluate_groups,
    "features": write_features,
}
