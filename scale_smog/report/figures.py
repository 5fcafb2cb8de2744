"""The course of runs as figures of plotly.js: plain data and layout, which the page draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scale_smog.reporting.run_record import Curve, RunRecord

MOST_POINTS = 2000  # of a curve
COLOURS = ("#2a6f97", "#c8553d", "#4f772d", "#7b4b94", "#b8860b", "#3d405b", "#008080", "#a4243b")
INK, SOFT, GRID = "#222222", "#6b7785", "#e6eaee"
DASHED = {"chance_loss", "groups_in_use"}

# Title, unit of the axis, and the figures on it with the words for them.
CHARTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Loss", "", {"loss": "loss", "chance_loss": "chance"}),
    (
        "Accuracy",
        "top-1",
        {"knn": "kNN", "online_knn": "kNN, online", "online_linear": "linear, online"},
    ),
    (
        "Usage of the groups",
        "groups",
        {"group_perplexity": "perplexity", "groups_in_use": "in use"},
    ),
    (
        "Effective rank (RankMe)",
        "dimensions",
        {"rankme_bank": "of the bank", "rankme_features": "of backbone features"},
    ),
    (
        "Uniformity and alignment",
        "lower is better",
        {"uniformity": "uniformity", "alignment": "alignment"},
    ),
    ("Learning rate", "", {"lr": "rate"}),
    ("Momentum of the groups", "beta", {"beta": "beta"}),
    ("Speed", "images/s", {"images_per_s": "images/s"}),
    ("Wait for data", "share of the time", {"data_wait": "wait for data"}),
    ("Largest group", "share of the features", {"largest_group_share": "share"}),
)


def charts_of_run(record: RunRecord) -> list[dict[str, Any]]:
    """A chart for each kind of figure that the run has logged, with the resets as marks."""
    made = []
    for title, unit, names in CHARTS:
        curves = {words: record.curve(name) for name, words in names.items()}
        lines = [
            _line(words, curves[words], COLOURS[i], is_dashed=name in DASHED)
            for i, (name, words) in enumerate(names.items())
            if curves[words][0]
        ]
        if lines:
            made.append(_chart(title, unit, [*lines, *_resets(record)]))
    return made


def charts_of_several(records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """The first figure of each kind, a line a run."""
    made = []
    for title, unit, names in CHARTS:
        name, words = next(iter(names.items()))
        curves = {run: record.curve(name) for run, record in records.items()}
        lines = [
            _line(run, curve, COLOURS[i % len(COLOURS)], is_dashed=i >= len(COLOURS))
            for i, (run, curve) in enumerate(curves.items())
            if curve[0]
        ]
        if lines:
            made.append(_chart(title if len(names) == 1 else f"{title}: {words}", unit, lines))
    return made


def _chart(title: str, unit: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "linecolor": GRID}
    layout = {
        "height": 300,
        "margin": {"l": 50, "r": 12, "t": 8, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "x unified",
        "showlegend": len(lines) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {**axis, "title": {"text": "step"}},
        "yaxis": {**axis, "title": {"text": unit}},
        # The resets have an axis of their own: a row of marks along the bottom.
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }
    return {"title": title, "data": lines, "layout": layout}


def _line(name: str, curve: Curve, colour: str, is_dashed: bool) -> dict[str, Any]:
    steps, values = thinned(curve)
    dash = "dash" if is_dashed else "solid"
    return {
        "type": "scatter",
        "mode": "lines" if len(steps) > 40 else "lines+markers",
        "name": name,
        "x": steps,
        # JSON knows no NaN; a gap in the line.
        "y": [float(f"{value:.5g}") if math.isfinite(value) else None for value in values],
        "line": {"color": colour, "width": 1.8, "dash": dash},
        "marker": {"size": 4},
    }


def _resets(record: RunRecord) -> list[dict[str, Any]]:
    steps = record.reset_steps
    if not steps:
        return []
    _, drifts = record.curve("reset/drift")
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "k-means",
            "x": list(steps),
            "y": [0.02] * len(steps),
            "yaxis": "y2",
            "marker": {"symbol": "triangle-up", "size": 7, "color": SOFT},
            "text": [f"groups moved by {drift:.3f} (cosine)" for drift in drifts],
            "hovertemplate": "%{text}<extra>k-means</extra>",
        }
    ]


def thinned(curve: Curve) -> tuple[Sequence[int], Sequence[float]]:
    """Every n-th point, counted from the last, where there are more than a chart can show."""
    every = -(-len(curve[0]) // MOST_POINTS)
    return tuple(values[::-1][:: max(every, 1)][::-1] for values in curve)  # pyright: ignore[reportReturnType]
