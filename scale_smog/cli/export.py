"""Exports a checkpoint's backbone: `smog export CHECKPOINT OUT --format {timm,torchvision,hf}`.

OUT gets model.safetensors and a README.md that says how to load it; `--full` adds heads, momentum
net and groups.
"""

import argparse

FORMATS = ("timm", "torchvision", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the folder and the format."""
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step-*")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--net", choices=("online", "momentum"), default="online")
    parser.add_argument("--full", action="store_true", help="heads, momentum net and groups too")


def run(arguments: argparse.Namespace) -> int:
    """Exports and says how to load it."""
    from scale_smog.export import WEIGHTS_FILE, export

    done = export(
        arguments.checkpoint, arguments.out, arguments.format, arguments.full, arguments.net
    )
    print(f"{done.folder / WEIGHTS_FILE}: {done.num_features} features; to load it:\n")
    print(done.usage)
    return 0
