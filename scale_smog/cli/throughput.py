"""Profiles a recipe's step and predicts 8 to 1,024 GPUs: `smog throughput RECIPE [overrides]`.

Writes profile.json, a trace for TensorBoard and a plot to the recipe's run folder. The same program
runs alone and under deepspeed, torchrun and srun.
"""

import argparse

from scale_smog.cli.arguments import add_recipe
from scale_smog.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, what to measure and which machine to predict for."""
    add_recipe(parser)
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--synthetic", action="store_true", help="random views, no dataset")
    parser.add_argument("--loader-only", action="store_true", help="load and do nothing else")
    parser.add_argument("--no-trace", action="store_true", help="no trace of two steps at the end")
    parser.add_argument(
        "--hardware",
        default="",
        help="h200, h100, a100 or your own file: the machine to predict for (default: this one's "
        "GPU, else h200)",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the links between these ranks first"
    )


def run(arguments: argparse.Namespace) -> int:
    """Profiles."""
    from scale_smog.recipe import load_recipe
    from scale_smog.throughput import Options, profile

    if arguments.steps < 1 or arguments.warm_up < 0:
        raise UserError("--steps is at least 1 and --warm-up at least 0")
    options = Options(
        num_steps=arguments.steps,
        num_warm_up=arguments.warm_up,
        synthetic=arguments.synthetic,
        loader_only=arguments.loader_only,
        trace=not arguments.no_trace,
        hardware=arguments.hardware,
        calibrate=arguments.calibrate,
    )
    profile(load_recipe(arguments.recipe, arguments.overrides), options)
    return 0
