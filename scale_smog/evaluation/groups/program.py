"""Purity of groups as a program: checkpoints and other methods' features, overlaid."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scale_smog import distributed
from scale_smog.checkpoint.nets import read_part
from scale_smog.config import GroupingConfig
from scale_smog.data.datasets import Images
from scale_smog.data.loaders.build import open_together
from scale_smog.errors import UserError
from scale_smog.evaluation.features import Encoder, raw_pixels
from scale_smog.evaluation.groups.gallery import write_gallery
from scale_smog.evaluation.groups.pictures import NUM_PICTURED, draw_group_entropy, draw_groups
from scale_smog.evaluation.groups.quality import GroupQuality, cluster_features, group_quality
from scale_smog.evaluation.splits import random_subset, require_labels
from scale_smog.evaluation.task import EvaluationTask
from scale_smog.grouping import MomentumGroups
from scale_smog.runtime import run_layout

ROWS_AT_ONCE = 2**15  # of features: times all groups they are a matrix of GiB
ENTROPY_PICTURE = "group_entropy.png"


def evaluate_groups(
    paths: Sequence[str], overrides: Iterable[str], with_paper: bool = False
) -> None:
    """Purity of groups: a table, pictures, results.json (SMoG Figure 5).

    A path is a checkpoint, or an .npz file of another method with `features` [N, D] and `labels`
    [N], which k-means puts into as many groups as the first checkpoint has. The pictures, and the
    results of a checkpoint, go into the run's folder; without a checkpoint, beside the first file.
    With `evaluation.baselines=true`, k-means of raw pixels and of the random net's features too.

    Raises:
        UserError: a path, the dataset or a setting does not fit; on every rank.
    """
    checkpoints = [path for path in paths if not path.endswith(".npz")]
    files = [Path(path) for path in paths if path.endswith(".npz")]
    if not paths:
        raise UserError("groups takes a checkpoint or an .npz file, or several")
    with distributed.process_group() as device:
        of_files = {path.stem: _read_features(path) for path in files}
        qualities: dict[str, GroupQuality] = {}
        opened = [_opened(EvaluationTask.open("groups", x, overrides, device)) for x in checkpoints]
        for task, dataset in opened:
            by_net = _checkpoint_groups(task, dataset)
            task.finish(_results(by_net), {})
            trained = f"{task.run_dir.name}, {task.checkpoint.name}"
            if trained in qualities:
                trained = f"{task.run_dir}, {task.checkpoint.name}"
            qualities |= {trained if k == "trained" else k: v for k, v in by_net.items()}
        num_groups = next((q.num_groups for q in qualities.values()), GroupingConfig().num_groups)
        for name, (features, labels) in of_files.items():
            groups = cluster_features(features, num_groups)
            qualities[name] = group_quality(groups, labels, num_groups)
        if distributed.is_main():
            folder = [*(task.run_dir for task, _ in opened), *(path.parent for path in files)][0]
            draw_group_entropy(folder / ENTROPY_PICTURE, qualities)
            print(_table(qualities))
            pictures = [folder / ENTROPY_PICTURE]
            pictures += [_picture_folder(task) / run_layout.GROUPS_PICTURE for task, _ in opened]
            print("pictures: " + ", ".join(map(str, pictures)))
            if with_paper:
                print("the paper shows these groups' entropy as Figure 5, without numbers")


def _opened(task: EvaluationTask) -> tuple[EvaluationTask, Images]:
    """The task with all that its result depends on, and the training images.

    Raises:
        UserError: the method has no groups, or an image has no label.
    """
    method, path = task.recipe.method, task.recipe.data.path
    if not method.has_groups:
        raise UserError(f"{task.run_dir}: method.name={method.name} has no groups")
    dataset = open_together(path, "train")
    require_labels(dataset, path, "the purity of groups")
    settings = {"evaluation": task.recipe.evaluation.model_dump()}
    return replace(task, settings=settings, data_sha256={"train": dataset.sha256}), dataset


def _results(by_net: dict[str, GroupQuality]) -> dict[str, float]:
    """The trained net's under plain names, a baseline's with its name before them."""
    return {
        key if name == "trained" else f"{name}_{key}": value
        for name, quality in by_net.items()
        for key, value in quality.results.items()
    }


def _checkpoint_groups(task: EvaluationTask, dataset: Images) -> dict[str, GroupQuality]:
    """The training images, centre crops, in a checkpoint's groups and, if asked, in baselines'."""
    ids = np.arange(dataset.num_samples)
    labels = torch.from_numpy(dataset.labels)
    z, groups = task.embed(_projection(task), dataset, ids), _groups(task)
    num_groups = len(groups.centroids)
    assigned = torch.cat([groups.assign(rows) for rows in z.split(ROWS_AT_ONCE)]).cpu()  # [N]
    qualities = {"trained": group_quality(assigned, labels, num_groups)}
    if distributed.is_main():
        shown = random_subset(len(ids), NUM_PICTURED)
        usage = torch.bincount(assigned, minlength=num_groups)
        folder = _picture_folder(task)
        picture = folder / run_layout.GROUPS_PICTURE
        draw_groups(picture, dataset, ids[shown], z[shown], groups.centroids, usage)
        write_gallery(folder / run_layout.GALLERY_FILE, dataset, ids, z, groups.centroids, usage)
    if task.recipe.evaluation.baselines:
        baselines: dict[str, Encoder] = {
            "raw_pixels": raw_pixels,
            "random_net": task.frozen(task.random_backbone()),
        }
        for name, encoder in baselines.items():
            clusters = cluster_features(task.embed(encoder, dataset, ids), num_groups).cpu()
            qualities[name] = group_quality(clusters, labels, num_groups)
    return qualities


def _picture_folder(task: EvaluationTask) -> Path:
    """The run's, whose pictures are of its end, or the evaluation's own."""
    is_own = task.recipe.evaluation.net == task.own_net and task.is_of_the_run()
    return task.run_dir if is_own else task.made_folder()


def _projection(task: EvaluationTask) -> Encoder:
    """The frozen backbone and projector: images [B, 3, H, W] -> unit z [B, D]."""
    net = task.net()
    project = task.frozen(nn.Sequential(net.backbone, net.projector))
    return lambda images: F.normalize(project(images).float())


def _groups(task: EvaluationTask) -> MomentumGroups:
    if task.recipe.nets.num_prototypes:  # trained with the net
        centroids = F.normalize(read_part(task.checkpoint, "online")["predictor.weight"])
    else:
        centroids = read_part(task.checkpoint, "groups")["centroids"]
    centroids = centroids.to(task.device)  # [K, D]
    num_groups, dim = centroids.shape
    groups = MomentumGroups(num_groups, dim).to(task.device)
    groups.commit(centroids)
    return groups


def _read_features(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] float and labels [N] int64 of another method.

    Raises:
        UserError: the file does not hold these.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, labels = arrays["features"], arrays["labels"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold arrays 'features' and 'labels': {error}") from None
    is_sound = features.ndim == 2 and np.issubdtype(features.dtype, np.floating)
    if not is_sound or labels.shape != features.shape[:1]:
        raise UserError(
            f"{path}: features [N, D] of floating point and labels [N] are needed, these are "
            f"{list(features.shape)} {features.dtype} and {list(labels.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise UserError(f"{path}: labels are numbers of classes from 0, one for each image")
    return torch.from_numpy(features), torch.from_numpy(labels.astype(np.int64))


def _table(qualities: dict[str, GroupQuality]) -> str:
    lines = []
    for name, quality in qualities.items():
        lines.append(name)
        lines += [f"  {key:<20}{value:.4g}" for key, value in quality.results.items()]
    return "\n".join(lines)
