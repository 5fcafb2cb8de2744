"""Says what a setting means: `smog explain data.order`; `smog explain` lists all of them.

Type, range, default, meaning and the place in the paper: of a recipe's settings and of the
evaluation protocols'.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The setting."""
    parser.add_argument("key", nargs="?", metavar="section.key", help="a setting or a section")


def run(arguments: argparse.Namespace) -> int:
    """Prints one setting, a section, or all."""
    from scale_smog.cli.settings import explain

    print(explain(arguments.key or ""))
    return 0
