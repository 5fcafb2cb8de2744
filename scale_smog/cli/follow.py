"""Sends a run's figures and pictures on: `smog follow RUN --to {wandb,mlflow,trackio,tensorboard}`.

It reads the run's folder, live or afterwards, ends with the run, and goes on where it was when it
is started again. Training does not know of it: no server or network can slow or stop a run.
"""

import argparse
from contextlib import suppress
from pathlib import Path

TRACKERS = ("wandb", "mlflow", "trackio", "tensorboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and where to."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--to", choices=TRACKERS, required=True)
    parser.add_argument("--project", default="scale_smog", help="under which runs are gathered")
    parser.add_argument("--server", default="", help="its address, or TensorBoard's folder")
    parser.add_argument("--once", action="store_true", help="send what there is, and end")


def run(arguments: argparse.Namespace) -> int:
    """Follows until the run is at its end."""
    from scale_smog.reporting.follow import follow

    with suppress(KeyboardInterrupt):
        follow(
            arguments.run, arguments.to, arguments.project, arguments.server, once=arguments.once
        )
    return 0
