"""The evaluations as programs: a checkpoint in, a table and results.json out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from scale_smog import checkpoint, distributed, run_folder
from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.evaluation.knn import KnnProbe
from scale_smog.models import build_backbone
from scale_smog.recipe import load_recipe


def evaluate_knn(path: str, overrides: Iterable[str]) -> None:
    """kNN accuracy of a checkpoint's backbone, printed and added to the run's results.json."""
    device = distributed.start()
    try:
        folder, run_dir = find_checkpoint(Path(path))
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
    model = recipe.model
    backbone = build_backbone(model.backbone, model.width, model.small_images)
    tensors, _ = checkpoint.load(folder, "online")
    prefix = "online.backbone."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(own)
    except RuntimeError:
        raise UserError(
            f"{folder} does not hold a {model.backbone} of width {model.width}"
        ) from None
    backbone.to(device, torch.float32).eval()
    is_bf16 = recipe.engine.precision == "bf16"

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            return backbone(images)

    return embed
