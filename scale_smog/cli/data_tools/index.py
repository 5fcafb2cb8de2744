"""Makes a dataset of tars that others made: `smog index OUT [--split train]`.

Writes .idx, sidecar and manifest beside webdataset tars, which stay as they are. What cannot be
used is listed in {split}-quarantine.jsonl.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and how to take it."""
    parser.add_argument("out", help="folder of the tars, or a quoted pattern of some")
    words = "name that the tars get as a split (default: %(default)s)"
    parser.add_argument("--split", default="train", help=words)
    words = "largest share left out (default: %(default)s)"
    parser.add_argument("--max-bad", type=float, default=0.05, help=words)


def run(arguments: argparse.Namespace) -> int:
    """Indexes and counts."""
    from scale_smog.data.prepare.index import index_folder

    split = index_folder(arguments.out, split=arguments.split, max_bad=arguments.max_bad)
    print(f"{split.num_samples:,} samples in {len(split.shards):,} shards", file=sys.stderr)
    return 0
