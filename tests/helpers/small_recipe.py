"""A recipe that trains in a second, for tests of whole runs."""

import os
from pathlib import Path

from scale_smog import Recipe, load_recipe

TEXT = """\
run: {steps: 8, log_every: 1, checkpoint_every: 0, keep_checkpoints: 100}
data: {path: "", global_batch: 12, loader: torch, workers: 0, large_px: 24, small_px: 16}
model: {backbone: resnet_tiny, head_width: 32, dim: 16, ema: 0.9}
grouping: {num_groups: 10, reset_every: 3}
optimizer: {name: adamw, base_lr: 2e-3, weight_decay: 0.01, warmup_epochs: 0.5}
engine: {precision: fp32}
evaluation: {k: 5, image_px: 24, crop_share: 1.0, batch: 16}
"""


def small_recipe(folder: Path, data: Path | str, *overrides: str) -> Recipe:
    """The recipe with its run folder `folder/run` on the dataset `data`."""
    return load_recipe(write_small_recipe(folder, data), overrides)


def write_small_recipe(folder: Path, data: Path | str) -> Path:
    """The recipe as a file in `folder`; several ranks may write it at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    text = TEXT.replace('path: ""', f'path: "{data}"')
    own = folder / f"{os.getpid()}.yaml"
    own.write_text(text.replace("run: {", f'run: {{dir: "{folder / "run"}", '))
    return own.rename(path)
