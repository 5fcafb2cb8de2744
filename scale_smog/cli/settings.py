"""Every setting by its key, as `smog explain`, docs/settings.md and the JSON schema show it.

`python -m scale_smog.cli.settings` writes both files in docs/ anew.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from scale_smog.config import INT64, Recipe
from scale_smog.errors import UserError
from scale_smog.evaluation.protocols import Protocols

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SCHEMA = "settings.md", "recipe.schema.json"
BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
}
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
HEADER = """\
# Settings

Written by `python -m scale_smog.cli.settings` from `scale_smog/config.py` and
`scale_smog/evaluation/protocols.py`. `smog explain data.order` prints a row, `smog explain` all of
them. A setting is changed in a recipe's file or on the command line: `data.order=block`.
"""


@dataclass(frozen=True)
class Setting:
    """One key of a recipe or of an evaluation protocol."""

    key: str  # section.name
    values: str  # type and range
    default: str  # as YAML
    meaning: str
    paper: str  # place in the SMoG paper; "" where none is known


def list_settings(model: type[BaseModel]) -> list[Setting]:
    """The settings of a recipe (`Recipe`) or of the evaluation protocols (`Protocols`)."""
    return [
        _setting(f"{section}.{name}", schema)
        for section, own in _sections(model).items()
        for name, schema in own.model_json_schema()["properties"].items()
    ]


def explain(key: str) -> str:
    """What is known of a setting, or a line on each of a section; "": of all.

    Raises:
        UserError: there is no such setting; the nearest is suggested.
    """
    settings = [*list_settings(Recipe), *list_settings(Protocols)]
    found = [setting for setting in settings if setting.key == key]
    if found:
        return _block(found[0])
    section = [setting for setting in settings if not key or setting.key.startswith(f"{key}.")]
    if not section:
        raise UserError(f"no setting '{key}'{_nearest(key, [each.key for each in settings])}")
    return "\n".join(f"{each.key:<34}{each.default:<12}  {each.meaning}" for each in section)


def settings_page() -> str:
    """docs/settings.md."""
    parts = [HEADER, *_tables(Recipe), "\n# Settings of the evaluations\n", *_tables(Protocols)]
    return "\n".join(parts)


def recipe_schema() -> str:
    """docs/recipe.schema.json: what editors and validators know of a recipe."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | Recipe.model_json_schema(), indent=1) + "\n"


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    fields = model.model_fields.items()
    return {name: field.annotation for name, field in fields}  # pyright: ignore[reportReturnType]


def _setting(key: str, schema: dict[str, Any]) -> Setting:
    words = " ".join(schema["description"].split())
    meaning, _, paper = words.partition(" Paper: ")
    default = _yaml(schema["default"]) if "default" in schema else "must be given"
    return Setting(key, _values(schema), default, meaning, paper.removesuffix("."))


def _yaml(value: Any) -> str:
    if value in ("", None):
        return "empty"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
    return f"{value:g}" if isinstance(value, float) else text


def _values(schema: dict[str, Any]) -> str:
    """Type and range in words."""
    if "anyOf" in schema:
        return " or ".join(_values(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kind = schema.get("type")
    if kind == "null":
        return "empty"
    if kind == "object":
        return "mapping"
    if kind == "array":
        pair = schema.get("prefixItems")
        return f"two of: {_values(pair[0])}" if pair else f"list of: {_values(schema['items'])}"
    bounds = [
        words.format(f"{schema[name]:g}")
        for name, words in BOUNDS.items()
        if name in schema and schema[name] != INT64
    ]
    return " ".join([NAMES[str(kind)], *bounds])


def _block(setting: Setting) -> str:
    rows = [
        (setting.key, setting.meaning),
        ("  values", setting.values),
        ("  default", setting.default),
        *([("  paper", f"SMoG, {setting.paper}")] if setting.paper else []),
    ]
    return "\n".join(f"{name:<24}{words}" for name, words in rows)


def _nearest(key: str, keys: Iterable[str]) -> str:
    by_name = {known.partition(".")[2]: known for known in keys}
    by_key = {known: known for known in keys}
    candidates = by_key if "." in key else by_name
    near = difflib.get_close_matches(key, candidates, n=1)
    return f": did you mean '{candidates[near[0]]}'?" if near else "; `smog explain` lists all"


def _tables(model: type[BaseModel]) -> list[str]:
    lines = []
    settings = list_settings(model)
    for section, own in _sections(model).items():
        lines += [f"\n## {section}\n", " ".join((own.__doc__ or "").split()), ""]
        lines += ["| key | values | default | meaning | paper |", "|---|---|---|---|---|"]
        lines += [_row(each) for each in settings if each.key.startswith(f"{section}.")]
    return lines


def _row(setting: Setting) -> str:
    key = setting.key.partition(".")[2]
    cells = [f"`{key}`", setting.values, setting.default, setting.meaning, setting.paper]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


if __name__ == "__main__":
    (DOCS / PAGE).write_text(settings_page() + "\n", encoding="utf-8")
    (DOCS / SCHEMA).write_text(recipe_schema(), encoding="utf-8")
