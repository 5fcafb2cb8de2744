"""The course of a run as one picture: loss, usage of the groups, accuracies, and the resets."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scale_smog.reporting.run_record import Curve, RunRecord
from scale_smog.runtime import run_layout

if TYPE_CHECKING:  # only the rank that draws imports matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACIES = {"knn": "kNN", "online_knn": "kNN, online", "online_linear": "linear, online"}
INK, SOFT, ACCENT = "#222222", "#9aa5b1", "#2a6f97"
MOST_RESETS_DRAWN = 60  # more lines would be a surface


def draw_run_curves(run_dir: Path) -> None:
    """Writes `curves.png` from the run's metrics.jsonl and TensorBoard events; on rank 0 only.

    One panel each for loss, perplexity and, where there are any, accuracies, over the steps. A full
    disk costs the picture and not the run's success.
    """
    record = RunRecord.read(run_dir)
    if not record.logged:
        return
    try:
        _draw(record).savefig(
            run_dir / run_layout.CURVES_FILE, bbox_inches="tight", facecolor="white"
        )
    except OSError as error:
        text = f"warning: no {run_layout.CURVES_FILE}: {error.strerror}"
        print(text, file=sys.stderr, flush=True)


def _draw(record: RunRecord) -> "Figure":
    from matplotlib.figure import Figure

    curves = {name: record.curve(tag) for tag, name in ACCURACIES.items()}
    accuracies = {name: curve for name, curve in curves.items() if curve[0]}
    num_panels = 3 if accuracies else 2
    figure = Figure(figsize=(8, 2.3 * num_panels), dpi=110)
    panels = figure.subplots(num_panels, sharex=True, squeeze=False)[:, 0]
    _draw_loss(panels[0], record)
    _draw_perplexity(panels[1], record)
    if accuracies:
        _draw_accuracies(panels[2], accuracies)
    resets = record.reset_steps
    for axes in panels:
        for step in resets if len(resets) <= MOST_RESETS_DRAWN else ():
            axes.axvline(step, color=SOFT, lw=0.6, alpha=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    panels[-1].set_xlabel("step; thin lines: k-means resets" if resets else "step")
    figure.align_ylabels()
    return figure


def _draw_loss(axes: "Axes", record: RunRecord) -> None:
    axes.plot(*record.curve("loss"), color=ACCENT, lw=1.4, label="loss")
    axes.plot(*record.curve("chance_loss"), color=INK, lw=1, ls=(0, (4, 3)), label="chance")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")


def _draw_perplexity(axes: "Axes", record: RunRecord) -> None:
    axes.plot(*record.curve("group_perplexity"), color=ACCENT, lw=1.4, label="perplexity")
    axes.plot(*record.curve("groups_in_use"), color=INK, lw=1, label="groups in use")
    axes.set(ylabel="groups", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right")


def _draw_accuracies(axes: "Axes", accuracies: dict[str, Curve]) -> None:
    for number, (name, curve) in enumerate(accuracies.items()):
        axes.plot(*curve, f"C{number}", marker=".", lw=1.4, label=name)
    axes.set(ylabel="top-1 accuracy", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower right")
