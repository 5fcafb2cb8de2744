"""Trains a recipe: `pretrain.py RECIPE [section.key=value ...] [--dry-run]`.

The same program runs alone and under deepspeed, torchrun and srun.
"""

import argparse
import signal

# Importing takes seconds: until the run listens, these two wait.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

from scale_smog import distributed, load_recipe  # noqa: E402
from scale_smog.errors import exits_on_user_error  # noqa: E402
from scale_smog.preflight.dry_run import dry_run  # noqa: E402
from scale_smog.pretrain import pretrain  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML file, such as recipes/r50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and do not train")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    with exits_on_user_error():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.dry_run:
            print(dry_run(recipe))
        else:
            pretrain(recipe)


if __name__ == "__main__":
    main()
    distributed.end_process()
