"""The evaluations as programs: a checkpoint in, a table and results.json out."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scale_smog import checkpoint, distributed, run_folder
from scale_smog.config import GroupingConfig, Recipe
from scale_smog.data import TarDataset
from scale_smog.errors import UserError
from scale_smog.evaluation.features import embed_images
from scale_smog.evaluation.group_quality import GroupQuality, cluster_features, group_quality
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.evaluation.pictures import draw_group_entropy
from scale_smog.grouping import MomentumGroups
from scale_smog.models import OnlineNet, build_nets
from scale_smog.recipe import load_recipe


def evaluate_knn(paths: Sequence[str], overrides: Iterable[str]) -> None:
    """kNN accuracy of a checkpoint's backbone, printed and added to the run's results.json."""
    if len(paths) != 1:
        raise UserError(f"knn takes one checkpoint, not {len(paths)}")
    device = distributed.start()
    try:
        folder, run_dir = find_checkpoint(Path(paths[0]))
        recipe = load_recipe(run_dir / run_folder.RECIPE_FILE, overrides)
        probe = KnnProbe(recipe.data, recipe.evaluation, device)
        figures = {
            "trained": probe.accuracy(load_backbone(folder, recipe, device)),
            **probe.settings,
        }
        run_folder.add_results(run_dir, {"knn": figures})
        if distributed.is_main():
            print(f"{folder}\n  kNN top-1   {figures['trained']:.4f}")
            print(f"  settings    {json.dumps(probe.settings)}")
            print(f"  results     {run_dir / run_folder.RESULTS_FILE}")
    finally:
        distributed.stop()


def evaluate_groups(paths: Sequence[str], overrides: Iterable[str]) -> None:
    """Purity of groups: a table, a picture of the entropies' density (SMoG Figure 5), results.json.

    A path is a checkpoint, or an .npz file of another method with `features` [N, D] and `labels`
    [N], which k-means puts into as many groups as the first checkpoint has. The picture, and the
    figures of a checkpoint, go into the run's folder; without a checkpoint, beside the first file.
    """
    device = distributed.start()
    try:
        qualities: dict[str, GroupQuality] = {}
        folders = []
        for path in (Path(path) for path in paths if not path.endswith(".npz")):
            folder, run_dir = find_checkpoint(path)
            recipe = load_recipe(run_dir / run_folder.RECIPE_FILE, overrides)
            quality = _checkpoint_groups(folder, recipe, device)
            run_folder.add_results(run_dir, {"groups": quality.figures})
            qualities[f"{run_dir.name}, {folder.name}"] = quality
            folders.append(run_dir)
        num_groups = [quality.num_groups for quality in qualities.values()]
        for path in (Path(path) for path in paths if path.endswith(".npz")):
            quality = _file_groups(
                path, num_groups[0] if num_groups else GroupingConfig().num_groups
            )
            qualities[path.stem] = quality
            folders.append(path.parent)
        if distributed.is_main():
            picture = folders[0] / "group_entropy.png"
            draw_group_entropy(picture, qualities)
            for name, quality in qualities.items():
                print(name)
                for key, value in quality.figures.items():
                    print(f"  {key:<18}{value:.4g}")
            print(f"picture: {picture}")
    finally:
        distributed.stop()


def _checkpoint_groups(folder: Path, recipe: Recipe, device: torch.device) -> GroupQuality:
    """The training images, centre crops, in the groups of a checkpoint."""
    dataset = TarDataset(recipe.data.path, "train")
    ids = np.arange(dataset.num_samples)[: recipe.evaluation.num_train_images or None]
    labels = torch.from_numpy(dataset.labels[ids])
    if (labels < 0).any():
        raise UserError(f"the purity of groups needs labels, and {recipe.data.path} has none")
    project = load_projection(folder, recipe, device)
    z = embed_images(project, recipe.data, recipe.evaluation, dataset, ids, device)
    centroids = checkpoint.load(folder, "groups")[0]["groups.centroids"].to(device)
    num_groups, dim = centroids.shape
    groups = MomentumGroups(num_groups, dim).to(device)
    groups.commit(centroids)
    return group_quality(groups.assign(z).cpu(), labels, num_groups)


def _file_groups(path: Path, num_groups: int) -> GroupQuality:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, labels = arrays["features"], arrays["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold arrays 'features' and 'labels': {error}") from None
    groups = cluster_features(features, num_groups)
    return group_quality(groups, torch.from_numpy(labels).long(), num_groups)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint folder that `path` means, and its run's folder.

    Raises:
        UserError: neither a run with a whole checkpoint nor a whole checkpoint.
    """
    if path.parent.name == "checkpoints":
        if problem := checkpoint.whole_or_why(path):
            raise UserError(f"not a whole checkpoint: {problem}")
        return path, path.parent.parent
    whole = [f for f in checkpoint.generations(path) if checkpoint.whole_or_why(f) is None]
    if not whole:
        raise UserError(f"no checkpoint in {path}: give a run folder or its checkpoints/step-*")
    return whole[-1], path


def load_backbone(folder: Path, recipe: Recipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The frozen online backbone of a checkpoint: images [B, 3, H, W] -> features [B, F]."""
    return _frozen(load_online_net(folder, recipe).backbone, recipe, device)


def load_projection(
    folder: Path, recipe: Recipe, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The frozen backbone and projector: images [B, 3, H, W] -> unit z [B, D]."""
    net = load_online_net(folder, recipe)
    project = _frozen(nn.Sequential(net.backbone, net.projector), recipe, device)
    return lambda images: functional.normalize(project(images).float())


def load_online_net(folder: Path, recipe: Recipe) -> OnlineNet:
    """The online net of a checkpoint, on the CPU in float32.

    Raises:
        UserError: the checkpoint holds another net than the recipe describes.
    """
    online, _ = build_nets(recipe.model)
    tensors, _ = checkpoint.load(folder, "online")
    own = {name.removeprefix("online."): value for name, value in tensors.items()}
    try:
        online.load_state_dict(own)
    except RuntimeError:
        model = recipe.model
        raise UserError(
            f"{folder} does not hold a {model.backbone} of width {model.width}"
        ) from None
    return online


def _frozen(net: nn.Module, recipe: Recipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    net.to(device, torch.float32).eval()
    is_bf16 = recipe.engine.precision == "bf16"

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            return net(images)

    return embed
