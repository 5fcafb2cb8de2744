"""What a profile says: the figures of profile.json, the table, the plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_smog.config import Recipe
from scale_smog.profiling.advice import bottleneck
from scale_smog.profiling.flops import roofline_s
from scale_smog.profiling.hardware import Hardware
from scale_smog.profiling.scaling_model import (
    Measured,
    Prediction,
    strong_scaling,
    weak_scaling,
)
from scale_smog.profiling.step_profile import PARTS, StepProfile
from scale_smog.profiling.workload import Workload

PLOT_FILE = "scaling.png"
SHOWN = (8, 64, 256, 1024)


@dataclass(frozen=True)
class DeviceFacts:
    """The devices that a step was measured on."""

    name: str  # `cpu` where there is no GPU
    num_ranks: int
    flops_per_s: float  # peak in the step's precision
    bytes_per_s: float  # of the memory
    memory_mib: float  # peak in use
    memory_share: float  # of all there is; 0: not known


def facts(
    recipe: Recipe, measured: StepProfile, work: Workload, device: DeviceFacts
) -> dict[str, Any]:
    """The figures of the ranks at hand."""
    step_s, cost = measured.step_s, work.cost
    roofs = {
        name: roofline_s(cost.ops, device.flops_per_s, device.bytes_per_s, folded)
        for name, folded in (("roofline_fraction", True), ("eager_roofline_fraction", False))
    }
    return {
        "step_s": step_s,
        "images_per_s": recipe.data.global_batch / step_s,
        "parts": measured.parts,
        "communication": {
            "exposed_s": measured.parts["communication"],
            "hidden_s": measured.hidden_communication_s,
        },
        "percentiles_s": measured.percentiles_s,
        "peak_memory_mib": device.memory_mib,
        "gflop_per_image": cost.flops / work.batch / 1e9,
        "mfu": cost.flops / step_s / device.flops_per_s,
        **{name: roof / step_s for name, roof in roofs.items()},
        "bottleneck": bottleneck(recipe, measured.parts, device.name != "cpu", device.memory_share),
        "device": device.name,
        "ranks": device.num_ranks,
        "batch_per_rank": work.batch,
        "backbone": f"{recipe.model.backbone} x{recipe.model.width}",
        "engine": recipe.engine.kind,
        "precision": recipe.engine.precision,
        "batch_norm": recipe.model.batch_norm,
        "loader": recipe.data.loader,
    }


def predictions(
    recipe: Recipe, target: Hardware, batch: int, measured: Measured | None, folder: Path
) -> dict[str, Any]:
    """Weak scaling by engine and scope of batch norm, strong scaling of the recipe; and a plot."""
    weak = weak_scaling(recipe, target, batch, measured)
    strong = strong_scaling(recipe, target, measured)
    plot(recipe, target, weak, strong, folder / PLOT_FILE)
    return {
        "predictions": [x.as_dict() for x in weak],
        "strong_scaling": [x.as_dict() for x in strong],
        "weak_images_a_gpu": batch,
        "strong_global_batch": recipe.data.global_batch,
        "predicted_for": target.name,
        "predicted_from": "measured parts" if measured else "the roof of its operations",
    }


def text(facts: dict[str, Any]) -> str:
    """The table for the console."""
    step_s, parts = facts["step_s"], facts["parts"]
    lines = [
        f"{facts['backbone']}, {facts['engine']}, {facts['precision']}, {facts['ranks']} rank(s) "
        f"of {facts['device']} x {facts['batch_per_rank']} images, data by {facts['loader']}",
        "",
        *(
            f"  {name:<20}{parts[name] * 1e3:>10.2f} ms{parts[name] / step_s:>8.1%}"
            for name in PARTS
        ),
        f"  {'step':<20}{step_s * 1e3:>10.2f} ms{facts['images_per_s']:>12.1f} images/s",
        "",
        "  step p50 / p95 / p99  "
        + " / ".join(f"{x * 1e3:.1f}" for x in facts["percentiles_s"].values())
        + " ms",
        f"  communication         {_communication(**facts['communication'])}",
        f"  peak memory           {facts['peak_memory_mib']:.0f} MiB",
        f"  MFU, roofline         {facts['mfu']:.1%}, {facts['roofline_fraction']:.1%}"
        f" (all operations apart: {facts['eager_roofline_fraction']:.1%})",
        "",
        facts["bottleneck"],
    ]
    if "predictions" in facts:
        lines += ["", *_prediction_lines(facts)]
    return "\n".join(lines)


def _communication(exposed_s: float | None, hidden_s: float | None) -> str:
    if exposed_s is None or hidden_s is None:
        return "not measured: it takes a trace"
    return f"{exposed_s * 1e3:.2f} ms exposed, {hidden_s * 1e3:.2f} ms hidden"


def loader_text(facts: dict[str, Any]) -> str:
    """The loader alone."""
    return (
        f"{facts['loader']} loader alone: {facts['images_per_s']:.1f} images/s, "
        f"{facts['batch_s'] * 1e3:.1f} ms a batch"
    )


def _prediction_lines(facts: dict[str, Any]) -> list[str]:
    title = f"PREDICTED for {facts['predicted_for']}, from {facts['predicted_from']}"
    lines = [
        f"{title}: images/s, low to high, and efficiency",
        f"  weak scaling: always {facts['weak_images_a_gpu']} images a GPU; strong scaling: always "
        f"the recipe's global batch of {facts['strong_global_batch']}",
        f"  {'GPUs':>5}  {'scaling':<8}{'global batch':>13}{'images/s':>12}",
    ]
    for kind, key in (("weak", "predictions"), ("strong", "strong_scaling")):
        for row in facts[key]:
            of_all = row["gpus"] * facts["weak_images_a_gpu"]
            global_batch = of_all if kind == "weak" else facts["strong_global_batch"]
            own = row["engine"] == facts["engine"] and row["batch_norm"] == facts["batch_norm"]
            if own and row["gpus"] in SHOWN:
                low, nominal, high = row["images_per_s"]
                lines.append(
                    f"  {row['gpus']:>5}  {kind:<8}{global_batch:>13,}{nominal:>12,.0f}   "
                    f"({low:,.0f} to {high:,.0f}){row['efficiency']:>8.0%}"
                )
    return lines


def plot(
    recipe: Recipe,
    target: Hardware,
    weak: Sequence[Prediction],
    strong: Sequence[Prediction],
    path: Path,
) -> None:
    """Images a second over GPUs, with their ranges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    own = recipe.engine.kind
    curves = {
        f"weak, {own}, batch norm {scope}": [
            x for x in weak if x.engine == own and x.batch_norm == scope
        ]
        for scope in ("global", "node")
    }
    curves[f"strong, {own}, batch norm {recipe.model.batch_norm}"] = list(strong)
    for name, points in curves.items():
        if not points:  # no number of GPUs divides the global batch
            continue
        gpus = [x.gpus for x in points]
        low, nominal, high = zip(*(x.images_per_s for x in points), strict=True)
        (line,) = axes.plot(gpus, nominal, marker="o", label=name)
        axes.fill_between(gpus, low, high, alpha=0.15, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, predicted")
    axes.set_xticks(SHOWN, [str(n) for n in SHOWN])
    axes.set_title(f"{recipe.model.backbone} x{recipe.model.width} on {target.name}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
