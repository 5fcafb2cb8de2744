"""Says what a dataset holds: `smog stats OUT [--samples grid.png]`.

Counts, sizes, classes and a histogram of resolutions.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and what to draw of it."""
    parser.add_argument("out", help="dataset folder, of tars or of images")
    parser.add_argument("--samples", metavar="PNG", help="draw augmented views of eight images")
    parser.add_argument("--seed", type=int, default=0, help="other images, other views")


def run(arguments: argparse.Namespace) -> int:
    """Counts, and draws where it is asked to."""
    from scale_smog.data.prepare.stats import describe, draw_samples

    print(describe(arguments.out))
    if arguments.samples:
        draw_samples(arguments.out, arguments.samples, seed=arguments.seed)
    return 0
