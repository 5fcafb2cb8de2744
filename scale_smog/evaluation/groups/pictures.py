"""Pictures of groups: the images that they hold, their use, their purity."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scale_smog.data.datasets import Images
from scale_smog.evaluation.groups.quality import GroupQuality
from scale_smog.grouping import perplexity

if TYPE_CHECKING:  # only the rank that draws imports them
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from PIL import Image

NUM_PICTURED = 2048  # training images among which the picture finds each group's closest
NUM_GROUPS_SHOWN = 10
NUM_IMAGES_SHOWN = 8
SHEET_PX, SHEET_GAP_PX = 96, 5
INK, ACCENT = "#222222", "#2a6f97"


def draw_groups(
    path: Path, dataset: Images, ids: np.ndarray, z: Tensor, groups: Tensor, usage: Tensor
) -> None:
    """One sheet: how much each group is used, and what the tightest and the loosest groups hold.

    Args:
        path: PNG to write.
        dataset: where the images are.
        ids: sample ids [N] of a sample of the training images.
        z: their unit features [N, D].
        groups: [K, D].
        usage: features a group over the last steps [K].
    """
    from matplotlib.figure import Figure

    similarity = (z.to(groups.dtype) @ groups.T).cpu()  # [N, K]
    nearest = similarity.argmax(dim=1)  # [N]
    best = torch.where(nearest[:, None] == torch.arange(len(groups)), similarity, -torch.inf)
    best, images = best.topk(min(NUM_IMAGES_SHOWN, len(ids)), dim=0)  # [8, K]: of own members
    tightness = best.mean(dim=0)  # -inf where a group has fewer members than are shown
    order = tightness.argsort(descending=True, stable=True).tolist()
    full = [group for group in order if tightness[group].isfinite()]
    sheets = {"tightest": (full or order)[:NUM_GROUPS_SHOWN]}
    if len(full) > NUM_GROUPS_SHOWN:
        sheets["loosest"] = full[NUM_GROUPS_SHOWN:][-NUM_GROUPS_SHOWN:][::-1]

    figure = Figure(figsize=(6 + 6 * len(sheets), 7.5), dpi=110)  # no pyplot: nothing to close
    widths = (2, *[3] * len(sheets))
    left, *places = figure.add_gridspec(1, len(widths), width_ratios=widths, wspace=0.1)
    _draw_usage(figure.add_subplot(left), usage.cpu())
    for (kind, shown), place in zip(sheets.items(), places, strict=True):
        members = {g: ids[images[best[:, g].isfinite(), g]].reshape(-1).tolist() for g in shown}
        _draw_members(figure, place, dataset, kind, members)
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def _draw_members(
    figure: "Figure",
    place: "SubplotSpec",
    dataset: Images,
    kind: str,
    members: Mapping[int, Sequence[int]],
) -> None:
    """A row a group: the sample ids closest to it."""
    from PIL import Image

    cell = SHEET_PX + SHEET_GAP_PX
    sheet = Image.new("RGB", (NUM_IMAGES_SHOWN * cell, len(members) * cell), "white")
    for row, samples in enumerate(members.values()):
        for column, sample_id in enumerate(samples):
            sheet.paste(thumbnail(dataset, sample_id, SHEET_PX), (column * cell, row * cell))
    axes = figure.add_subplot(place)
    axes.imshow(sheet)
    axes.set_xticks([])
    middles = [row * cell + SHEET_PX / 2 for row in range(len(members))]
    axes.set_yticks(middles, [str(group) for group in members])
    axes.tick_params(length=0, labelcolor=INK, labelsize=10)
    axes.spines[:].set_visible(False)
    title = f"Images closest to the {len(members)} {kind} groups, one row per group"
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def draw_group_entropy(path: Path, curves: Mapping[str, GroupQuality]) -> None:
    """SMoG Figure 5: density of the groups' class entropy, a curve a grouping.

    Args:
        path: PNG to write.
        curves: a name for each grouping.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.add_subplot()
    top = max(float(quality.entropy.max()) for quality in curves.values())
    at = np.linspace(0, 1.05 * max(top, 0.1), 400)
    for number, (name, quality) in enumerate(curves.items()):
        label = (
            f"{name}: mean {quality.entropy_mean:.2f}, by size {quality.entropy_weighted:.2f}, "
            f"NMI {quality.nmi:.2f}"
        )
        (line,) = axes.plot(at, _density(quality.entropy.numpy(), at), f"C{number}", label=label)
        axes.axvline(quality.entropy_weighted, color=line.get_color(), lw=1, ls=(0, (4, 3)))
    axes.set(xlim=(0, at[-1]), ylim=(0, None), ylabel="density of the groups in use")
    axes.set_xlabel("entropy of the classes in a group, nats; dashed: mean weighted by size")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def _density(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Gaussian kernel density [A] of values [G], reflected at 0: an entropy is never below."""
    width = max(1.06 * values.std() * len(values) ** -0.2, 0.02)  # Silverman's rule
    both = np.concatenate([values, -values])
    kernels = np.exp(-0.5 * ((at[:, None] - both) / width) ** 2)  # [A, 2 G]
    return kernels.sum(axis=1) / (len(values) * width * np.sqrt(2 * np.pi))


def _draw_usage(axes: "Axes", usage: Tensor) -> None:
    """Sorted usage as a curve, even usage as a line."""
    share = usage.double() / usage.sum().clamp(min=1) * len(usage)  # 1 is even usage
    axes.fill_between(
        range(len(share)), share.sort(descending=True).values, color=ACCENT, step="mid"
    )
    axes.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    axes.text(len(share), 1, "even ", ha="right", va="bottom", color=INK)
    axes.set(xlim=(0, len(share)), ylim=(0, None), xlabel="groups, most used first")
    axes.set_ylabel("features, relative to even usage")
    in_use = int((usage > 0).sum())
    axes.set_title(
        f"{in_use} of {len(usage)} groups in use, perplexity {perplexity(usage):.0f}",
        loc="left",
        fontsize=11,
        color=INK,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def thumbnail(dataset: Images, sample_id: int, px: int) -> "Image.Image":
    """The middle of an image, small: a sheet of whole photographs weighs tens of megabytes."""
    from PIL import Image

    image = Image.open(BytesIO(dataset.read(sample_id))).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(
        (px, px), Image.Resampling.BICUBIC
    )
