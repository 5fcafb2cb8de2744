"""Writes images as tar shards: python data_tools/shard.py SRC OUT [options]."""

import argparse

from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.workers import num_usable_cores
from scale_smog.errors import exits_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes images as tar shards. The same command resumes a run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "src",
        help="image folder (a sub-folder per class, or flat and unlabelled), or *.csv with the "
        "columns path and label, *.parquet, *.tar; a quoted pattern names several files",
    )
    add("out", help="dataset folder; may hold other splits already")
    add("--split", default="train", help="name of the split")
    add("--seed", type=int, default=0, help="of the shuffle")
    add("--shard-mib", type=int, default=256, help="largest shard, MiB")
    add("--shard-samples", type=int, default=2000, help="most samples in a shard")
    add("--workers", type=int, default=num_usable_cores(), help="number of processes")
    add("--resize-shorter", type=int, metavar="PX", help="shrink images to this shorter side")
    add("--reencode", type=int, metavar="QUALITY", help="make JPEGs of this quality of all images")
    add(
        "--no-check",
        dest="full_check",
        action="store_false",
        help="read the images' headers only; damaged images will stop the training instead",
    )
    add("--max-bad", type=float, default=0.05, help="largest share of images put aside")
    options = vars(parser.parse_args())
    with exits_on_user_error():
        shard_folder(options.pop("src"), options.pop("out"), **options)


if __name__ == "__main__":
    main()
