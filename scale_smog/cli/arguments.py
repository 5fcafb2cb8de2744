"""What several commands take."""

import argparse


def add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """A recipe and overrides of its settings.

    Args:
        parser: of the command.
        nargs: of the recipe; "?" where it may be left out.
    """
    words = "a YAML file, or the name of a recipe that `smog recipes` lists"
    parser.add_argument("recipe", nargs=nargs, metavar="RECIPE", help=words)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Overrides of settings."""
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="see `smog explain`"
    )
