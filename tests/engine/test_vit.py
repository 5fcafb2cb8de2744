"""A ViT trains on large and small views under every way to spread a net."""

import os
from pathlib import Path

import torch
from ranks import run_on_ranks
from small_recipe import small_recipe

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.loop import train_step
from scale_smog.schedules import ScheduledValues
from scale_smog.state import build_state

NUM_STEPS = 2


def losses(folder: Path, kind: str, backbone: str, sizes: tuple[int, int], num: int) -> list[float]:
    """Losses of steps on two random images of this rank, two large and four small views of each."""
    large, small = sizes
    os.environ |= {
        "LOCAL_RANK": str(distributed.rank()),
        "LOCAL_WORLD_SIZE": "2",
    }  # as launchers do
    recipe = small_recipe(
        folder / kind,
        "",
        *(f"engine.kind={kind}", f"model.backbone={backbone}", "data.global_batch=4"),
        *(f"data.large_px={large}", f"data.small_px={small}", "data.num_small_crops=4"),
        *(f"evaluation.image_px={large}", "grouping.init=random", "optimizer.clip_norm=1.0"),
    )
    state = build_state(recipe, 2, torch.device("cpu"), num_images=100)
    found = []
    for step in range(num):
        generator = torch.Generator().manual_seed(step)
        views = [
            torch.randn(2, 3, px, px, generator=generator) for px in (large,) * 2 + (small,) * 4
        ]
        batch = Batch(views[:2], views[2:], torch.full((2,), -1), torch.arange(2))
        report = train_step(state, batch, ScheduledValues(0.0, 0.0, 1e-3, 0.05, 0.99))
        assert report.is_applied
        found.append(report.loss.item())
    return found


def losses_by_engine(folder: Path) -> dict[str, list[float]]:
    small_vit = ("test_vit", (64, 32), NUM_STEPS)
    return {kind: losses(folder, kind, *small_vit) for kind in ("ddp", "zero3", "fsdp")}


def test_a_vit_trains_on_views_of_two_sizes(tmp_path):
    for by_engine in run_on_ranks(2, losses_by_engine, tmp_path):
        for kind, found in by_engine.items():
            assert len(found) == NUM_STEPS and torch.tensor(found).isfinite().all(), kind
