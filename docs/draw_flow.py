"""Draws docs/flow.svg, the way of the data through the package: `python docs/draw_flow.py`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, SOFT, ACCENT, PAPER = "#222222", "#7a8793", "#2a6f97", "#eef3f6"
# name: (x, y, width, title, what it holds)
BOXES = {
    "tars": (0.0, 5.4, 2.2, "tar shards", "data/prepare"),
    "plan": (0.0, 4.0, 2.2, "sample order", "data/plan"),
    "augment": (0.0, 2.6, 2.2, "sampled\naugmentations", "data/augment"),
    "loader": (4.0, 4.0, 2.2, "loader: DALI,\ntorch, memory …", "data/loaders"),
    "online": (8.2, 5.4, 2.2, "online net", "models · engine"),
    "momentum": (8.2, 2.6, 2.2, "momentum net", "models · engine"),
    "groups": (12.0, 4.0, 2.2, "groups", "grouping"),
    "bank": (12.0, 1.6, 2.2, "bank, k-means", "grouping"),
    "loss": (16.4, 5.4, 2.2, "loss", "methods · loss"),
    "optimizer": (16.4, 3.5, 2.2, "optimizer, EMA", "optim · engine"),
    "out": (16.4, 1.6, 2.2, "checkpoint,\nmetrics", "checkpoint · reporting"),
}
HEIGHT = 1.0
# from, to, text, where the text stands: (x, y), left aligned
ARROWS = [
    ("tars", "loader", "encoded images", (2.75, 5.2)),
    ("plan", "loader", "sample ids", (2.45, 4.15)),
    ("augment", "loader", "crops, colours …", (2.85, 2.75)),
    ("loader", "online", "view a,\nsmall crops", (6.35, 5.15)),
    ("loader", "momentum", "view b", (6.5, 2.95)),
    ("online", "groups", "z [B, D]", (11.25, 4.95)),
    ("momentum", "groups", "z′ [B, D]", (11.25, 3.05)),
    ("online", "loss", "p [V, B, D]", (12.6, 5.56)),
    ("groups", "loss", "targets [B],\nnew groups [K, D]", (14.4, 3.85)),
    ("loss", "optimizer", "gradients", (17.6, 4.45)),
    ("bank", "groups", "z of the last steps;\nevery N steps k-means\nover all ranks", (13.2, 2.8)),
    ("optimizer", "out", "", (0, 0)),
]


def draw(path: Path) -> None:
    """Writes the picture, the same bytes each time."""
    matplotlib.rcParams["svg.hashsalt"] = "flow"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(14, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, 19.0), ylim=(0.9, 6.1))
    axes.axis("off")
    for name in BOXES:
        _box(axes, name)
    for start, end, text, place in ARROWS:
        _arrow(axes, start, end)
        axes.text(*place, text, fontsize=8.5, color=SOFT, ha="left", va="center")
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _box(axes: Axes, name: str) -> None:
    x, y, width, title, home = BOXES[name]
    color = ACCENT if home == "grouping" else INK
    axes.add_patch(
        FancyBboxPatch(
            (x, y - HEIGHT / 2),
            width,
            HEIGHT,
            boxstyle="round,pad=0.04,rounding_size=0.12",
            facecolor=PAPER,
            edgecolor=color,
        )
    )
    axes.text(x + width / 2, y + 0.12, title, ha="center", va="center", fontsize=11, color=color)
    axes.text(x + width / 2, y - 0.38, home, ha="center", va="center", fontsize=8.5, color=SOFT)


def _arrow(axes: Axes, start: str, end: str) -> None:
    x0, y0, w0, *_ = BOXES[start]
    x1, y1, w1, *_ = BOXES[end]
    if x1 > x0 + w0:  # to the right
        a, b = (x0 + w0 + 0.06, y0), (x1 - 0.08, y1)
    elif y1 < y0:
        a, b = (x0 + w0 / 2, y0 - HEIGHT / 2 - 0.06), (x1 + w1 / 2, y1 + HEIGHT / 2 + 0.08)
    else:
        a, b = (x0 + w0 / 2, y0 + HEIGHT / 2 + 0.06), (x1 + w1 / 2, y1 - HEIGHT / 2 - 0.08)
    axes.annotate("", b, a, arrowprops={"arrowstyle": "->", "color": SOFT, "lw": 1.2})


if __name__ == "__main__":
    draw(Path(__file__).with_name("flow.svg"))
