"""Writes the built-in labelled images as tar shards: 8,000 train, 2,000 test, ten classes."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the seed."""
    parser.add_argument("out", help="dataset folder")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")


def run(arguments: argparse.Namespace) -> int:
    """Writes both splits."""
    from scale_smog.data.prepare.demo import make_demo

    make_demo(arguments.out, seed=arguments.seed)
    return 0
