"""Trains a recipe: `smog pretrain RECIPE [section.key=value ...] [--dry-run]`.

The same program runs alone and under deepspeed, torchrun and srun.
"""

import argparse
import signal

from scale_smog.cli.arguments import add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, overrides, and whether to train at all."""
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the plan and do not train")


def run(arguments: argparse.Namespace) -> int:
    """Trains, or prints the plan."""
    if arguments.dry_run:
        from scale_smog.preflight.dry_run import dry_run
        from scale_smog.recipe import load_recipe

        print(dry_run(load_recipe(arguments.recipe, arguments.overrides)))
        return 0
    # Importing takes seconds: until the run listens, these two wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    from scale_smog.pretrain import pretrain
    from scale_smog.recipe import load_recipe

    pretrain(load_recipe(arguments.recipe, arguments.overrides))
    return 0
