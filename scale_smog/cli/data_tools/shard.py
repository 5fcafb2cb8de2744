"""Writes images as tar shards: `smog shard SRC OUT [--split train]`. The same command resumes."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, dataset and how to write it."""
    add = parser.add_argument
    add(
        "src",
        help="image folder (a sub-folder per class, or flat and unlabelled), or *.csv with the "
        "columns path and label, *.parquet, *.tar; a quoted pattern names several files; or "
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, cifar-10-binary.tar.gz",
    )
    add("out", help="dataset folder; may hold other splits already")
    add("--split", default="train", help="name of the split (default: %(default)s)")
    words = "the archive's, where its name does not tell it: imagenet or cifar10"
    add("--layout", choices=["imagenet", "cifar10"], default="", help=words)
    words = "ImageNet's devkit, or a list of names and classes (default: the devkit beside SRC)"
    add("--labels", default="", metavar="FILE", help=words)
    words = "of parquet (default: image, img, jpg, png, ...)"
    add("--image-column", default="", metavar="NAME", help=words)
    words = "of parquet (default: label, fine_label, ...)"
    add("--label-column", default="", metavar="NAME", help=words)
    words = "in .json members of tars that holds the label (default: the number in .cls)"
    add("--label-key", default="", metavar="KEY", help=words)
    add("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    add("--shard-mib", type=int, default=256, help="largest shard, MiB (default: %(default)s)")
    words = "most samples in a shard (default: %(default)s)"
    add("--shard-samples", type=int, default=2000, help=words)
    add("--workers", type=int, help="number of processes (default: one a core)")
    add("--resize-shorter", type=int, metavar="PX", help="shrink images to this shorter side")
    add("--reencode", type=int, metavar="QUALITY", help="make JPEGs of this quality of all images")
    add(
        "--no-check",
        dest="full_check",
        action="store_false",
        help="read the images' headers only; damaged images will stop the training instead",
    )
    words = "largest share of images put aside (default: %(default)s)"
    add("--max-bad", type=float, default=0.05, help=words)


def run(arguments: argparse.Namespace) -> int:
    """Writes the split."""
    from scale_smog.data.prepare.shard import shard_folder
    from scale_smog.data.prepare.sources import SourceOptions
    from scale_smog.data.workers import num_usable_cores

    options = vars(arguments)
    names = ("layout", "labels", "image_column", "label_column", "label_key")
    about = SourceOptions(split=arguments.split, **{name: options.pop(name) for name in names})
    if options["workers"] is None:
        options["workers"] = num_usable_cores()
    shard_folder(options.pop("src"), options.pop("out"), about, **options)
    return 0
