"""Lists the recipes that come with the package, or prints one: `smog recipes r50 > mine.yaml`."""

import argparse
from pathlib import Path

from scale_smog.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe to print."""
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="the recipe to print")


def run(arguments: argparse.Namespace) -> int:
    """Prints names and first lines, or a whole recipe."""
    from scale_smog.recipe import find_recipe, shipped_recipes

    if arguments.recipe:
        print("\n".join(_lines(find_recipe(arguments.recipe))))
        return 0
    recipes = shipped_recipes()
    width = max(map(len, recipes)) + 2
    summaries = {name: _lines(path)[0].removeprefix("# ") for name, path in recipes.items()}
    print("\n".join(f"{name:<{width}}{summary}" for name, summary in summaries.items()))
    return 0


def _lines(path: Path) -> list[str]:
    """A recipe without its first line, which leads editors to a file of the checkout."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"no recipe {path}: {error.strerror}") from None
    return [line for line in lines if not line.startswith("# yaml-language-server")]
