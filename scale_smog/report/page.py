"""Puts a run, or several, into one HTML file that holds all it needs."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scale_smog.errors import UserError
from scale_smog.report.figures import charts_of_run, charts_of_several
from scale_smog.report.tables import (
    checkpoint_rows,
    differing_settings,
    evaluations,
    setting_rows,
    start_rows,
)
from scale_smog.reporting.run_record import RunRecord
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import write_atomically

ASSETS = Path(__file__).with_name("assets")
REPORT_FILE = "report.html"
VIEWS = {"views/0": "large, scheme A", "views/1": "large, scheme B"}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, finished or not.

    Args:
        run_dir: the run's folder.
        out: file to write; default: `report.html` in the run's folder.

    Returns:
        The file.

    Raises:
        UserError: not a run's folder, or the file cannot be written.
    """
    record = RunRecord.read(run_dir)
    page = _rendered(
        "run.html",
        name=run_dir.resolve().name,
        summary=_summary(record),
        key_figures=_key_figures(record),
        charts=charts_of_run(record),
        gallery=_gallery(run_dir),
        views=[(VIEWS.get(x, "small"), _data_url(png)) for x, png in record.pictures.items()],
        settings=setting_rows(record.recipe),
        starts=start_rows(record),
        checkpoints=checkpoint_rows(run_dir),
        evaluations=evaluations(record),
    )
    return _written(out or run_dir / REPORT_FILE, page)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes a page on which the curves of several runs lie over one another.

    Raises:
        UserError: one is not a run's folder, or the file cannot be written.
    """
    names = _distinct_names(run_dirs)
    records = {name: RunRecord.read(path) for name, path in zip(names, run_dirs, strict=True)}
    page = _rendered(
        "several.html",
        name=f"{len(records)} runs",
        charts=charts_of_several(records),
        runs=list(records),
        key_figures=_key_figure_rows(records),
        settings=differing_settings(records),
    )
    return _written(out, page)


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    plotly = (ASSETS / "plotly-basic.min.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(plotly=plotly, **values)


def _written(path: Path, page: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _summary(record: RunRecord) -> str:
    """What is trained on what, in a line."""
    recipe = record.recipe
    step = int(record.logged[-1]["step"]) if record.logged else 0
    length = f"{recipe.run.epochs:g} epochs" if recipe.run.epochs else f"{recipe.run.steps} steps"
    groups = f", {recipe.grouping.num_groups} groups" if recipe.method.has_groups else ""
    return (
        f"{recipe.method.name}: {recipe.model.backbone} on {Path(recipe.data.path).name}, batch "
        f"{recipe.data.global_batch}{groups}, {length}; logged up to step {step}"
    )


def _key_figures(record: RunRecord) -> dict[str, str]:
    """The newest of what one looks at first."""
    kinds = {
        "loss": ("loss", ".3f"),
        "knn": ("kNN top-1", ".3f"),
        "group_perplexity": ("group perplexity", ".0f"),
        "rankme_features": ("RankMe, features", ".1f"),
        "images_per_s": ("images/s", ",.0f"),
    }
    found = {}
    for name, (words, form) in kinds.items():
        _, values = record.curve(name)
        if name == "knn" and (final := _final_knn(record)) is not None:
            values = [*values, final]
        if len(values):
            found[words] = format(values[-1], form)
    return found


def _final_knn(record: RunRecord) -> float | None:
    """The accuracy of the run's results, unless the run has gone on since its end."""
    step = record.results.get("run", {}).get("step", 0)
    if record.logged and step < record.logged[-1]["step"]:
        return None
    return record.results.get("knn", {}).get("trained")


def _key_figure_rows(records: Mapping[str, RunRecord]) -> dict[str, list[str]]:
    """Figure -> its value in each run."""
    by_run = [_key_figures(record) for record in records.values()]
    names = dict.fromkeys(name for figures in by_run for name in figures)
    return {name: [figures.get(name, "–") for figures in by_run] for name in names}


def _gallery(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / run_layout.GALLERY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or all of their paths where two have the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
