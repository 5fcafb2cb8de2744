"""The nets that a checkpoint holds: found, read and built for whoever did not train them."""

import os
from pathlib import Path

from torch import Tensor

from scale_smog.checkpoint.loading import load
from scale_smog.checkpoint.manifest import find_damage, list_checkpoints
from scale_smog.config import ModelConfig, NetName, NetPlan
from scale_smog.errors import UserError
from scale_smog.models import MomentumNet, OnlineNet, build_nets
from scale_smog.runtime import run_layout


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint folder that `path` means, and its run's folder, both absolute.

    Args:
        path: a run's folder, its `checkpoints` (the newest whole one is meant) or one of these.

    Raises:
        UserError: neither a run with a whole checkpoint nor a whole checkpoint.
    """
    path = Path(os.path.abspath(path))  # names the parents of "." and "step-00000005" too
    if path in list_checkpoints(path.parent.parent):
        if problem := find_damage(path):
            raise UserError(f"not a whole checkpoint: {problem}")
        return path, path.parent.parent
    folder_name = run_layout.CHECKPOINTS_FOLDER
    is_run = path.name != folder_name or (path / folder_name).is_dir()
    run_dir = path if is_run else path.parent
    for folder in reversed(list_checkpoints(run_dir)):
        if find_damage(folder) is None:
            return folder, run_dir
    raise UserError(f"no checkpoint in {run_dir}: give a run folder or its checkpoints/step-*")


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """Tensors of one part, such as "online" or "groups", under their names without it."""
    tensors, _ = load(folder, part)
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items()}


def load_net(
    folder: Path, model: ModelConfig, plan: NetPlan, name: NetName = "online"
) -> OnlineNet | MomentumNet:
    """A net of a checkpoint, on the CPU in float32.

    Args:
        folder: of the checkpoint.
        model: the run's settings.
        plan: of the run's method.
        name: which of the two.

    Raises:
        UserError: the checkpoint holds another net than the settings describe, or no momentum net.
    """
    online, momentum = build_nets(model, plan)
    net = online if name == "online" else momentum
    if net is momentum and not plan.num_momentum_views:
        raise UserError(f"{folder} is of a method without momentum net: take the online net")
    try:
        net.load_state_dict(read_part(folder, name))
    except RuntimeError:
        raise UserError(
            f"{folder} does not hold a {model.backbone} of width {model.width}"
        ) from None
    return net
