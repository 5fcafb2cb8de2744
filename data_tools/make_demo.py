"""Writes the built-in image set as tar shards: python data_tools/make_demo.py OUT [--seed N]."""

import argparse

from scale_smog.data.prepare.demo import make_demo
from scale_smog.errors import exits_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes the built-in labelled images: 8,000 train, 2,000 test, ten classes."
    )
    parser.add_argument("out", help="dataset folder")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    args = parser.parse_args()
    with exits_on_user_error():
        make_demo(args.out, seed=args.seed)


if __name__ == "__main__":
    main()
