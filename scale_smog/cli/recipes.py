"""Lists the recipes that come with the package, or prints one: `smog recipes r50 > mine.yaml`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe to print."""
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="the recipe to print")


def run(arguments: argparse.Namespace) -> int:
    """Prints names and first lines, or a whole recipe."""
    from scale_smog.recipe import find_recipe, shipped_recipes

    if arguments.recipe:
        print(find_recipe(arguments.recipe).read_text(encoding="utf-8"), end="")
        return 0
    recipes = shipped_recipes()
    width = max(map(len, recipes)) + 2
    for name, path in recipes.items():
        print(f"{name:<{width}}{_summary(path.read_text(encoding='utf-8'))}")
    return 0


def _summary(text: str) -> str:
    """The first line that people read; the one before it is for editors."""
    comments = (line.removeprefix("# ") for line in text.splitlines())
    return next(line for line in comments if not line.startswith("yaml-language-server"))
