"""A new run begins with what another one has learnt: nets and groups, as far as they fit."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.checkpoint.loading import load
from scale_smog.checkpoint.manifest import list_checkpoints
from scale_smog.checkpoint.nets import find_checkpoint
from scale_smog.distributed import Partition
from scale_smog.errors import UserError
from scale_smog.models.hub import HUB, STATE_FILE, NotOnHub, fetch
from scale_smog.models.weights import backbone_sha256, read_weights, require_same_stem
from scale_smog.runtime import run_layout

PARTS = ("online", "momentum", "groups")  # of a checkpoint, and of an export with everything
OF_IMAGES = "groups.features"  # a row an image, by its id: of no use with other images


class Start(NamedTuple):
    """What a run can begin with."""

    tensors: Mapping[str, Tensor]  # by their names in a checkpoint, such as "groups.centroids"
    run_dir: Path | None  # of the run that trained them, where it is known

    @property
    def sha256(self) -> str:
        """Of the online backbone: the same for a run, its exports and their copies on a hub."""
        of_backbone = {
            name.removeprefix("online.backbone."): value
            for name, value in self.tensors.items()
            if name.startswith("online.backbone.")
        }
        return backbone_sha256(of_backbone)


def read_start(source: str, sha256: str = "", net: nn.Module | None = None) -> Start:
    """Reads a run, a checkpoint, an exported folder, a file of weights or hf-hub:USER/NAME.

    A collective: rank 0 reads, and sends the others what no thousand of them should read or fetch.

    Args:
        source: which.
        sha256: that it should have; "": any.
        net: the backbone that it is for, whose stem exported files tell.

    Raises:
        UserError: it is none of these, or has another hash or stem.
    """
    start = distributed.call_on_main(lambda: _read(source, net))
    if sha256 not in ("", start.sha256):
        raise UserError(
            f"run.start_from={source} holds other weights than run.start_sha256 says: "
            f"{start.sha256[:12]}, not {sha256[:12]}"
        )
    return start


def _read(source: str, net: nn.Module | None) -> Start:
    path = Path(source).absolute()
    if source.startswith(HUB):
        with suppress(NotOnHub):  # most have the backbone only
            return _read_state(fetch(source, STATE_FILE), net)
    elif is_checkpoint(path):
        folder, run_dir = find_checkpoint(path)
        tensors = {k: v for part in PARTS for k, v in load(folder, part)[0].items()}
        return Start(tensors, run_dir)
    elif (path / STATE_FILE).is_file():
        return _read_state(path / STATE_FILE, net)
    weights = read_weights(source, "run.start_from", net)
    return Start({f"online.backbone.{name}": value for name, value in weights.items()}, None)


def _read_state(file: Path, net: nn.Module | None) -> Start:
    if net is not None:
        require_same_stem(net, file)
    return Start(load_file(file), None)


def is_checkpoint(path: Path) -> bool:
    """Whether an absolute path is a run, its folder of checkpoints or one of these."""
    is_one = path in list_checkpoints(path.parent.parent)
    are_all = path.name == run_layout.CHECKPOINTS_FOLDER and bool(list_checkpoints(path.parent))
    return is_one or are_all or bool(list_checkpoints(path))


def fitting(
    start: Start, own: Mapping[str, Partition], parts: Sequence[str], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """This rank's values of what a start has of the right shape, and a line on each part.

    Args:
        start: what there is.
        own: what this rank holds of a state, as it begins.
        parts: which to take: "backbone", "heads", "momentum", "groups".
        source: what to call the start.

    Raises:
        UserError: the backbone does not fit.
    """
    taken: dict[str, Tensor] = {}
    lines, has_heads = [], False
    for part, names in _names_of_parts(own).items():
        if part not in parts or not names:
            continue
        misfit = _misfit(own, start.tensors, names)
        if part in ("momentum", "groups") and not misfit and not has_heads:
            misfit = "of other heads"
        if part == "groups" and not misfit and OF_IMAGES in names:
            misfit = "of the images that the start was trained on"
        if misfit and part == "backbone":
            raise UserError(f"run.start_from={source} holds another net: {misfit}")
        begun = f"initialised as usual ({misfit})" if misfit else f"from {source}"
        lines.append(f"{part}: {begun}")
        if not misfit:
            taken |= {name: start.tensors[name] for name in names}
            has_heads |= part == "heads"
    _follow(own, taken)
    return {name: _range(value, own[name]) for name, value in taken.items()}, lines


def _names_of_parts(own: Iterable[str]) -> dict[str, list[str]]:
    heads = ("online.projector.", "online.predictor.")
    return {
        "backbone": [name for name in own if name.startswith("online.backbone.")],
        "heads": [name for name in own if name.startswith(heads)],
        "momentum": [name for name in own if name.startswith("momentum.")],
        "groups": [name for name in own if name.startswith("groups.")],
    }


def _misfit(
    own: Mapping[str, Partition], tensors: Mapping[str, Tensor], names: Iterable[str]
) -> str:
    """The first name of which there is nothing, or of another shape; "" if all are there."""
    for name in names:
        if name not in tensors:
            return f"no {name}"
        if tensors[name].shape != own[name].shape:
            return f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
    return ""


def _follow(own: Mapping[str, Partition], taken: dict[str, Tensor]) -> None:
    """A momentum net that was not taken is a copy of the online net, as it always begins."""
    for name in own:
        if name.startswith("momentum.") and name not in taken:
            leader = name.replace("momentum.", "online.", 1)
            if leader in taken:
                taken[name] = taken[leader]


def _range(value: Tensor, partition: Partition) -> Tensor:
    """What a rank holds of a whole tensor."""
    values = partition.values
    stop = partition.start + values.numel()
    return value.reshape(-1)[partition.start : stop].view(values.shape)
