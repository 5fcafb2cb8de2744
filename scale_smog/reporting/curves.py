"""The course of a run as one picture: loss and accuracies over the steps."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_smog.evaluation.groups.pictures import Curve, draw_curves

CURVES_FILE = "curves.png"
ACCURACIES = {"knn": "kNN", "online_knn": "kNN, online", "online_linear": "linear, online"}


def draw_run_curves(run_dir: Path) -> None:
    """Writes `curves.png` from the run's metrics.jsonl and TensorBoard events; on rank 0 only."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    if logged:
        loss: Curve = [line["step"] for line in logged], [line["loss"] for line in logged]
        accuracies = _accuracies(run_dir / "tensorboard")
        draw_curves(run_dir / CURVES_FILE, loss, logged[-1]["chance_loss"], accuracies)


def _accuracies(folder: Path) -> dict[str, Curve]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag, name in ACCURACIES.items():
        if tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag)}
            curves[name] = sorted(points), [points[step] for step in sorted(points)]
    return curves
