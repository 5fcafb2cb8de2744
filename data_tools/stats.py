"""Says what a dataset holds: python data_tools/stats.py OUT [--samples grid.png]."""

import argparse

from scale_smog.data.prepare.stats import describe, draw_samples
from scale_smog.errors import exits_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Counts, sizes, classes and a histogram of resolutions."
    )
    parser.add_argument("out", help="dataset folder")
    parser.add_argument("--samples", metavar="PNG", help="draw augmented views of eight images")
    parser.add_argument("--seed", type=int, default=0, help="other images, other views")
    args = parser.parse_args()
    with exits_on_user_error():
        print(describe(args.out))
        if args.samples:
            draw_samples(args.out, args.samples, seed=args.seed)


if __name__ == "__main__":
    main()
