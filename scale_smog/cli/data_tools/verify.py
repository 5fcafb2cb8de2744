"""Checks every hash, index, label and image of a dataset folder: `smog verify OUT`.

Exit status 0 only if all is well.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("out", help="dataset folder")


def run(arguments: argparse.Namespace) -> int:
    """Prints the problems."""
    from scale_smog.data.prepare.verify import verify_folder

    problems = verify_folder(arguments.out)
    for problem in problems:
        print(problem)
    print(f"{arguments.out}: {f'{len(problems)} problems' if problems else 'all is well'}")
    return 1 if problems else 0
