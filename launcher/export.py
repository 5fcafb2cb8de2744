"""Exports a checkpoint's backbone: `export.py CHECKPOINT OUT --format {timm,torchvision,hf}`.

OUT gets model.safetensors and a README.md that says how to load it; `--full` adds heads, momentum
net and groups.
"""

import argparse

from scale_smog.errors import exits_on_user_error
from scale_smog.export import FORMATS, WEIGHTS_FILE, export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step-*")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--full", action="store_true", help="heads, momentum net and groups too")
    arguments = parser.parse_args()
    with exits_on_user_error():
        done = export(arguments.checkpoint, arguments.out, arguments.format, arguments.full)
        print(f"{done.folder / WEIGHTS_FILE}: {done.num_features} features; to load it:\n")
        print(done.usage)


if __name__ == "__main__":
    main()
