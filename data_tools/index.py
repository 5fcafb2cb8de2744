"""Makes a dataset of tars that others made: python data_tools/index.py OUT [--split train]."""

import argparse
import sys

from scale_smog.data.prepare.index import index_folder
from scale_smog.errors import exits_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes .idx, sidecar and manifest beside webdataset tars, which stay as "
        "they are. What cannot be used is listed in {split}-quarantine.jsonl.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", help="folder of the tars")
    parser.add_argument("--split", default="train", help="name that the tars get as a split")
    parser.add_argument("--max-bad", type=float, default=0.05, help="largest share left out")
    options = vars(parser.parse_args())
    with exits_on_user_error():
        split = index_folder(options.pop("out"), **options)
    print(f"{split.num_samples:,} samples in {len(split.shards):,} shards", file=sys.stderr)


if __name__ == "__main__":
    main()
