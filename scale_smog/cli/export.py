"""Exports a backbone: `smog export CHECKPOINT OUT --format {timm,torchvision,hf,onnx}`.

OUT gets the weights and a README.md that says how to load them; `--full` adds heads, momentum
net and groups. `--push USER/NAME` puts an hf folder on the hub, or on the server of HF_ENDPOINT.
"""

import argparse
from pathlib import Path

from scale_smog.errors import UserError

FORMATS = ("timm", "torchvision", "hf", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the folder and the format."""
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step-*")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--net", choices=("online", "momentum"), default="online")
    parser.add_argument("--full", action="store_true", help="heads, momentum net and groups too")
    parser.add_argument("--push", metavar="USER/NAME", help="of the hub, with --format hf")


def run(arguments: argparse.Namespace) -> int:
    """Exports and says how to load it."""
    from scale_smog.export import export
    from scale_smog.models.hub import push

    if arguments.push and arguments.format != "hf":
        raise UserError("--push takes --format hf")
    done = export(
        arguments.checkpoint, arguments.out, arguments.format, arguments.full, arguments.net
    )
    print(f"{done.folder}: {done.num_features} features; to load it:\n")
    print(done.usage)
    if arguments.push:
        print(f"\npushed to {push(Path(done.folder), arguments.push)}")
    return 0
