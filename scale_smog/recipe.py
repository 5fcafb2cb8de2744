"""Strict YAML plus `section.key=value` overrides -> Recipe."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from scale_smog.config import Recipe
from scale_smog.errors import UserError

M = TypeVar("M", bound=BaseModel)

SHIPPED = Path(__file__).with_name("recipes")  # in a checkout a link to its recipes/


_TAG = "tag:yaml.org,2002:"
YAML_1_1_TAGS = {f"{_TAG}{name}" for name in ("int", "float", "timestamp")}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers as YAML 1.2 does.

    PyYAML's YAML 1.1 takes 1e-3 for text, 010 for eight, 1:30 for ninety and 2024-06-01 for a date.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in YAML_1_1_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{_place(key_node)}: a key is a word, not a list or a mapping")
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UserError(f"{_place(key_node)}: key '{key}' appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name}, line {node.start_mark.line + 1}"


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "float": r"[-+]?((\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|\.nan$",
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts that either version of YAML takes for numbers."""


for _name, _pattern in NUMBERS.items():
    for _reader in (_StrictLoader, _Dumper):
        _reader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list("-+.0123456789"))


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides.

    Args:
        path: YAML file, or the name of a recipe that comes with the package, such as "r50";
            sections and keys as in `scale_smog.config`.
        overrides: `section.key=value` strings, as of `apply_override`.

    Returns:
        The resolved recipe, with `run.dir` filled in (`runs/<file name>` unless given).

    Raises:
        UserError: unreadable file, unknown key (the nearest is suggested), wrong type or range.
    """
    path = find_recipe(path)
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(
            f"cannot read recipe {path}: {error.strerror}{_nearest_recipe(path)}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read recipe {path}: it is not UTF-8 text") from None
    _require_sections(tree, path)
    for override in overrides:
        apply_override(tree, override, Recipe)
    run = tree.setdefault("run", {})
    if not run.get("dir"):
        run["dir"] = f"runs/{path.stem}"
    return validate(Recipe, tree)


def _require_sections(tree: Any, path: Path) -> None:
    if isinstance(tree, dict):
        for key in tree:
            section, dot, name = str(key).partition(".")
            if dot:
                raise UserError(
                    f"{path}: write '{key}' as '{section}: {{{name}: ...}}'; only the command line "
                    "has keys with dots"
                )
    if not isinstance(tree, dict) or not all(isinstance(v, dict) for v in tree.values()):
        raise UserError(f"{path}: a recipe is a mapping of sections to their keys")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by their names: "r50", "ablations/baseline"."""
    paths = sorted(SHIPPED.glob("**/*.yaml"), key=lambda path: (len(path.parts), path))
    return {str(path.relative_to(SHIPPED)).removesuffix(".yaml"): path for path in paths}


def find_recipe(path: str | Path) -> Path:
    """A recipe's file; where there is none of that name, the one that comes with the package."""
    return Path(path) if Path(path).is_file() else shipped_recipes().get(str(path), Path(path))


def _nearest_recipe(path: Path) -> str:
    """Suggests the shipped recipe of nearly that name."""
    near = difflib.get_close_matches(path.stem, shipped_recipes(), n=1)
    return f": did you mean '{near[0]}'?" if near else "; `smog recipes` lists the shipped ones"


def validate(model: type[M], tree: dict[str, Any]) -> M:
    """Sections of values, checked.

    Raises:
        UserError: unknown key (the nearest is suggested), wrong type or range.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, model)) from None


def apply_override(tree: dict[str, dict[str, Any]], override: str, model: type[BaseModel]) -> None:
    """Puts a `section.key=value` string into a tree of sections.

    Args:
        tree: changed in place.
        override: a key that holds text takes the value as it stands, any other one reads YAML.
        model: of the sections.

    Raises:
        UserError: it has another form.
    """
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UserError(f"override {override!r} is not UTF-8 text") from None
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"override '{override}' is not of the form section.key=value")
    if "." in name:
        first, *inner = name.split(".")
        for part in reversed(inner):
            value = f"{{{part}: {value}}}"
        raise UserError(
            f"override '{override}' has too many dots: the form is section.key=value, and a "
            f"mapping is given whole, '{section}.{first}={value}'"
        )
    values = tree.setdefault(section, {})
    if key in ("run.steps", "run.epochs"):  # one length replaces the other
        values.pop("steps", None)
        values.pop("epochs", None)
    is_text = _holds_text(model, section, name)
    values[name] = value if is_text else _parse_yaml(value, f"override '{override}'")


def _holds_text(model: type[BaseModel], section: str, name: str) -> bool:
    """Whether a key is a string, of any or of given values, and nothing else."""
    if section not in model.model_fields or name not in (fields := _fields(model, section)):
        return False
    annotation = fields[name].annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else (None,)
    return annotation is str or all(isinstance(choice, str) for choice in choices)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except UserError:
        raise
    # What a number, a date or a tag says may be impossible, and a value too deep.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not plain YAML: {' '.join(str(error).split())}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line on the first thing that is wrong, naming the key and what to write instead."""
    # A mistyped key says more than the checks that miss it.
    unknown = [x for x in error.errors() if x["type"] == "extra_forbidden"]
    first = [*unknown, *error.errors()][0]
    path = [str(part) for part in first["loc"] if not str(part).endswith("]")]
    key = ".".join(path[:2])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_suggestion(path, model)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"key '{key}': {first['msg'].lower()}, not {first['input']!r}"


def _suggestion(path: list[str], model: type[BaseModel]) -> str:
    sections = model.model_fields
    if len(path) == 1:
        return _nearest(path[0], {name: name for name in sections})
    own = {name: f"{path[0]}.{name}" for name in _fields(model, path[0])}
    everywhere = {
        name: f"{section}.{name}" for section in sections for name in _fields(model, section)
    }
    candidates = everywhere if path[1] in everywhere else own  # right name, wrong section
    return _nearest(path[1], candidates)


def _fields(model: type[BaseModel], section: str) -> dict[str, FieldInfo]:
    own = model.model_fields[section].annotation
    assert isinstance(own, type) and issubclass(own, BaseModel)
    return own.model_fields


def _nearest(word: str, candidates: dict[str, str]) -> str:
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f": did you mean '{candidates[matches[0]]}'?" if matches else ""
