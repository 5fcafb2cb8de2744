"""The course of a run as one picture: loss and accuracies over the steps."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES_FILE = "curves.png"
ACCURACIES = {"knn": "kNN", "online_knn": "kNN, online", "online_linear": "linear, online"}
INK = "#222222"

Curve = tuple[Sequence[int], Sequence[float]]  # steps, values


def draw_run_curves(run_dir: Path) -> None:
    """Writes `curves.png` from the run's metrics.jsonl and TensorBoard events; on rank 0 only."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    if logged:
        loss: Curve = [line["step"] for line in logged], [line["loss"] for line in logged]
        accuracies = _accuracies(run_dir / "tensorboard")
        draw_curves(run_dir / CURVES_FILE, loss, logged[-1]["chance_loss"], accuracies)


def draw_curves(path: Path, loss: Curve, chance_loss: float, accuracies: dict[str, Curve]) -> None:
    """Loss and accuracies of a run over its steps.

    Args:
        path: PNG to write.
        loss: steps and values.
        chance_loss: of a net that knows nothing.
        accuracies: name -> steps and values, 0 to 1.
    """
    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.add_subplot()
    axes.plot(*loss, color=INK, lw=1.2)
    axes.axhline(chance_loss, color=INK, lw=1, ls=(0, (4, 3)))
    axes.text(0.01, chance_loss, "chance", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top"]].set_visible(False)
    if accuracies:
        right = axes.twinx()
        for number, (name, curve) in enumerate(accuracies.items()):
            right.plot(*curve, f"C{number}", marker=".", label=name)
        right.set(ylabel="top-1 accuracy", ylim=(0, 1))
        right.legend(frameon=False, fontsize=9, loc="upper center")
        right.spines[["top"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def _accuracies(folder: Path) -> dict[str, Curve]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag, name in ACCURACIES.items():
        if tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag)}
            curves[name] = sorted(points), [points[step] for step in sorted(points)]
    return curves
