"""What evaluations read from a checkpoint; the only module here that knows how one is stored."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import checkpoint
from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.grouping import MomentumGroups
from scale_smog.models import OnlineNet, build_nets

Embed = Callable[[Tensor], Tensor]


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint folder that `path` means, and its run's folder.

    Raises:
        UserError: neither a run with a whole checkpoint nor a whole checkpoint.
    """
    if path.parent.name == "checkpoints":
        if problem := checkpoint.find_damage(path):
            raise UserError(f"not a whole checkpoint: {problem}")
        return path, path.parent.parent
    whole = [f for f in checkpoint.list_checkpoints(path) if checkpoint.find_damage(f) is None]
    if not whole:
        raise UserError(f"no checkpoint in {path}: give a run folder or its checkpoints/step-*")
    return whole[-1], path


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """Tensors of one part, such as "online" or "groups", under their names without it."""
    tensors, _ = checkpoint.load(folder, part)
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items()}


def load_online_net(folder: Path, recipe: Recipe) -> OnlineNet:
    """The online net of a checkpoint, on the CPU in float32.

    Raises:
        UserError: the checkpoint holds another net than the recipe describes.
    """
    online, _ = build_nets(recipe.model)
    try:
        online.load_state_dict(read_part(folder, "online"))
    except RuntimeError:
        model = recipe.model
        raise UserError(
            f"{folder} does not hold a {model.backbone} of width {model.width}"
        ) from None
    return online


def load_projection(folder: Path, recipe: Recipe, device: torch.device) -> Embed:
    """The frozen backbone and projector: images [B, 3, H, W] -> unit z [B, D]."""
    net = load_online_net(folder, recipe)
    project = frozen(nn.Sequential(net.backbone, net.projector), recipe, device)
    return lambda images: F.normalize(project(images).float())


def load_groups(folder: Path, device: torch.device) -> MomentumGroups:
    """The groups of a checkpoint."""
    centroids = read_part(folder, "groups")["centroids"].to(device)
    num_groups, dim = centroids.shape
    groups = MomentumGroups(num_groups, dim).to(device)
    groups.commit(centroids)
    return groups


def random_backbone(recipe: Recipe) -> nn.Module:
    """A backbone with random weights, of the run's seed, for comparison."""
    torch.manual_seed(recipe.run.seed)
    return build_nets(recipe.model)[0].backbone


def frozen(net: nn.Module, recipe: Recipe, device: torch.device) -> Embed:
    """`net` for inference on `device`, in the recipe's precision."""
    net.to(device=device, dtype=torch.float32).eval()
    is_bf16 = recipe.engine.precision == "bf16"

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            return net(images)

    return embed


def weights_sha256(net: nn.Module) -> str:
    """Hex SHA-256 of a net's names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if value.dim()
            else str(value.item()).encode()
        )
    return digest.hexdigest()
