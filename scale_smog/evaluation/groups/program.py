"""Purity of groups as a program: checkpoints and other methods' features, overlaid."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import GroupingConfig
from scale_smog.data.image_folder import open_split
from scale_smog.errors import UserError
from scale_smog.evaluation.checkpoints import (
    Embed,
    frozen,
    load_groups,
    load_projection,
    random_backbone,
)
from scale_smog.evaluation.features import embed_images
from scale_smog.evaluation.groups.pictures import draw_group_entropy, draw_groups
from scale_smog.evaluation.groups.quality import GroupQuality, cluster_features, group_quality
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.splits import require_labels
from scale_smog.reporting import run_folder

ENTROPY_PICTURE, GROUPS_PICTURE = "group_entropy.png", "groups.png"
NUM_PICTURED = 2048


def evaluate_groups(
    paths: Sequence[str], overrides: Iterable[str], with_paper: bool = False
) -> None:
    """Purity of groups: a table, pictures, results.json (SMoG Figure 5).

    A path is a checkpoint, or an .npz file of another method with `features` [N, D] and `labels`
    [N], which k-means puts into as many groups as the first checkpoint has. The pictures, and the
    figures of a checkpoint, go into the run's folder; without a checkpoint, beside the first file.
    With `evaluation.baselines=true`, k-means of raw pixels and of the random net's features too.

    Raises:
        UserError: a path, the dataset or a setting does not fit; on every rank.
    """
    with distributed.process_group() as device:
        qualities: dict[str, GroupQuality] = {}
        folders = []
        for path in (path for path in paths if not path.endswith(".npz")):
            job = Job.open("groups", path, overrides, device)
            own = _checkpoint_groups(job)
            figures = own["trained"].figures
            for name in own.keys() - {"trained"}:
                figures |= {f"{name}_{key}": value for key, value in own[name].figures.items()}
            run_folder.add_results(job.run_dir, {"groups": figures})
            trained = f"{job.run_dir.name}, {job.checkpoint.name}"
            qualities |= {trained if k == "trained" else k: v for k, v in own.items()}
            folders.append(job.run_dir)
        num_groups = [quality.num_groups for quality in qualities.values()]
        for path in (Path(path) for path in paths if path.endswith(".npz")):
            wanted = num_groups[0] if num_groups else GroupingConfig().num_groups
            qualities[path.stem] = _file_groups(path, wanted)
            folders.append(path.parent)
        if distributed.is_main():
            draw_group_entropy(folders[0] / ENTROPY_PICTURE, qualities)
            print(_table(qualities))
            print(f"pictures: {folders[0] / ENTROPY_PICTURE}, {GROUPS_PICTURE}")
            if with_paper:
                print("the paper shows these groups' entropy as Figure 5, without figures")


def _checkpoint_groups(job: Job) -> dict[str, GroupQuality]:
    """The training images, centre crops, in a checkpoint's groups and, if asked, in baselines'."""
    recipe, device = job.recipe, job.device
    dataset = open_split(recipe.data.path, "train")
    require_labels(dataset, recipe.data.path, "the purity of groups")
    ids = np.arange(dataset.num_samples)
    labels = torch.from_numpy(dataset.labels[ids])

    def features(embed: Embed) -> Tensor:
        return embed_images(embed, recipe.data, recipe.evaluation, dataset, ids, device)

    z = features(load_projection(job.checkpoint, recipe, device))
    groups = load_groups(job.checkpoint, device)
    num_groups = len(groups.centroids)
    own = groups.assign(z).cpu()
    qualities = {"trained": group_quality(own, labels, num_groups)}
    if distributed.is_main():
        shown = slice(min(NUM_PICTURED, len(ids)))  # shards are shuffled: a fair sample
        usage = torch.bincount(own, minlength=num_groups)
        picture = job.run_dir / GROUPS_PICTURE
        draw_groups(picture, dataset, ids[shown], z[shown], groups.centroids, usage)
    if recipe.evaluation.baselines:
        baselines = {
            "raw_pixels": lambda images: images.flatten(1),
            "random_net": frozen(random_backbone(recipe), recipe, device),
        }
        for name, embed in baselines.items():
            clusters = cluster_features(features(embed), num_groups).cpu()
            qualities[name] = group_quality(clusters, labels, num_groups)
    return qualities


def _file_groups(path: Path, num_groups: int) -> GroupQuality:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, labels = arrays["features"], arrays["labels"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold arrays 'features' and 'labels': {error}") from None
    groups = cluster_features(torch.from_numpy(features), num_groups)
    return group_quality(groups, torch.from_numpy(labels).long(), num_groups)


def _table(qualities: dict[str, GroupQuality]) -> str:
    lines = []
    for name, quality in qualities.items():
        lines.append(name)
        lines += [f"  {key:<18}{value:.4g}" for key, value in quality.figures.items()]
    return "\n".join(lines)
