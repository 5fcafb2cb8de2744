"""Profiles a recipe's step and predicts 8 to 1,024 GPUs: `throughput.py RECIPE [overrides]`.

Writes profile.json, a trace for TensorBoard and a plot to the recipe's run folder. The same program
runs alone and under deepspeed, torchrun and srun.
"""

import argparse

from scale_smog import distributed, load_recipe
from scale_smog.errors import exits_on_user_error
from scale_smog.throughput import Options, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML file, such as recipes/r50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
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
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 1 or arguments.warm_up < 0:
        parser.error("--steps is at least 1 and --warm-up at least 0")
    with exits_on_user_error():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        options = Options(
            num_steps=arguments.steps,
            num_warm_up=arguments.warm_up,
            synthetic=arguments.synthetic,
            loader_only=arguments.loader_only,
            trace=not arguments.no_trace,
            hardware=arguments.hardware,
            calibrate=arguments.calibrate,
        )
        profile(recipe, options)


if __name__ == "__main__":
    main()
    distributed.end_process()
