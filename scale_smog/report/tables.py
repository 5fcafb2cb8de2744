"""The tables of a run's page: settings beside the paper's, starts, checkpoints, evaluations."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from scale_smog.checkpoint.manifest import find_damage, list_checkpoints
from scale_smog.config import Recipe, StrictModel
from scale_smog.evaluation.paper import ImageCounts, Ours, Table, comparable_tables, formatted
from scale_smog.reporting.run_record import RunRecord
from scale_smog.runtime.stores import shown

PATHS = {"data.path", "run.dir"}


@dataclass(frozen=True)
class SettingRow:
    """A setting of the run beside the default, which is the paper's where it names a place."""

    key: str
    value: str
    default: str
    place: str  # in the paper; "" where it has none
    meaning: str

    @property
    def is_changed(self) -> bool:
        """Whether the run differs from the default."""
        return self.value != self.default


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with ours as its last row."""

    title: str
    source: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, and the paper's rows for it or why there are none."""

    name: str
    figures: Mapping[str, str]
    tables: Sequence[PaperTable]
    reason: str


def setting_rows(recipe: Recipe) -> list[SettingRow]:
    """Settings that the paper has a value of, and others that differ from their default."""
    rows = [
        _setting_row(f"{section}.{name}", getattr(own, name), own)
        for section, own in recipe
        for name in type(own).model_fields
    ]
    return [row for row in rows if row.place or row.is_changed]


def _setting_row(key: str, value: Any, section: StrictModel) -> SettingRow:
    field = type(section).model_fields[key.partition(".")[2]]
    meaning, _, place = " ".join((field.description or "").split()).partition(" Paper: ")
    default = "–" if field.is_required() else _plain(field.default)
    return SettingRow(key, _plain(value), default, place.removesuffix("."), meaning)


def _plain(value: Any) -> str:
    if value in ("", None):
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    return shown(str(value)) if not isinstance(value, bool | dict) else _flow(value)


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def differing_settings(records: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: key and each run's value."""
    values = {
        f"{section}.{name}": [_plain(getattr(getattr(r.recipe, section), name)) for r in all_runs]
        for all_runs in [list(records.values())]
        for section, own in all_runs[0].recipe
        for name in type(own).model_fields
    }
    return [(key, row) for key, row in values.items() if len(set(row)) > 1 and key not in PATHS]


def start_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """Of each start: time, step, ranks and hosts, device and versions."""
    return [
        (
            datetime.fromtimestamp(start["time"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
            str(start["step"]),
            f"{start['ranks']} on {', '.join(start['hosts'])}",
            f"{start['device']}; torch {start['torch']}, {start['engine']}, {start['precision']}",
        )
        for start in record.starts
    ]


def checkpoint_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Of each checkpoint, newest first: name, size, and whether its files are all there."""
    rows = []
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path, reads=False)
        with suppress(FileNotFoundError):  # training has removed it meanwhile
            mib = sum(file.stat().st_size for file in path.iterdir()) / 2**20
            rows.append((path.name, f"{mib:,.1f} MiB", damage or "complete"))
    return rows


def evaluations(record: RunRecord) -> list[Evaluation]:
    """The run's evaluations; those of results.json, and the paper's rows where images are alike.

    A run that has gone on since its results has their step in their names.
    """
    written = _written(record)
    step = int(record.results.get("run", {}).get("step", 0))
    has_gone_on = bool(record.logged) and step < record.logged[-1]["step"]
    return [
        Evaluation(
            f"{name}, step {step}" if has_gone_on else name,
            {k: _figure(v) for k, v in figures.items() if isinstance(v, str | int | float)},
            *_paper(record.recipe, step, written.get(name, {})),
        )
        for name, figures in record.results.items()
        if name != "run"
    ]


def _written(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The file behind each of the run's results; others are of other checkpoints or images."""
    paths = record.folder.glob("evaluations/*/results.json")
    contents = [json.loads(path.read_text()) for path in paths]
    return {
        name: content
        for content in contents
        if (name := content.get("result")) in record.results
        and content["figures"] == record.results[name]
    }


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _paper(recipe: Recipe, step: int, written: Mapping[str, Any]) -> tuple[list[PaperTable], str]:
    if "image_counts" not in written:
        return [], ""
    name = str(written["evaluation"])
    settings = written["settings"].get(name, {})
    ours = Ours.of_run(
        recipe,
        step,
        evaluation=name,
        share=settings.get("share", 0.0),
        dataset=settings.get("setting", ""),
        images=ImageCounts(**written["image_counts"]),
        results=written["figures"],
    )
    tables, reason = comparable_tables(ours)
    return [_paper_table(table, ours) for table in tables], reason


def _paper_table(table: Table, ours: Ours) -> PaperTable:
    cells = ours.cells()
    rows = [*table.rows, [cells.get(column) for column in table.columns]]
    columns = [formatted(values) for values in zip(*rows, strict=True)]
    texts = list(zip(*columns, strict=True))
    return PaperTable(table.title, table.source, table.columns, texts, table.note)
