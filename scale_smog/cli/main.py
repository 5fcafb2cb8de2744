"""`smog COMMAND ...`: finds the command and runs it."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from scale_smog.errors import exits_on_user_error

DATA_TOOLS = {"shard", "index", "verify", "stats", "make_demo"}  # modules of that folder
TEXTS = {"recipes", "explain"}  # that print and do nothing else
COMMANDS = {
    "pretrain": "train a recipe, alone or under deepspeed, torchrun and srun",
    "demo": "make the built-in images and train on them",
    "recipes": "list the recipes that come with the package, or print one",
    "explain": "say what a setting means",
    "check": "look before a run, or at a run's checkpoints",
    "shard": "write images as tar shards",
    "index": "make a dataset of tars that others made",
    "verify": "check a dataset's hashes, indexes, labels and images",
    "stats": "say what a dataset holds",
    "evaluate": "judge a checkpoint: knn, linear, finetune, groups, segmentation, ...",
    "report": "write a run, or several over one another, as a page",
    "follow": "send a run's figures on to wandb, mlflow, trackio or tensorboard",
    "export": "write a backbone for timm, torchvision or Hugging Face",
    "throughput": "profile a recipe's step and predict it for 8 to 1,024 GPUs",
}


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Runs `smog`.

    Args:
        words: of the command line, without the program's name; default: this process's.
    """
    words = _without_local_rank(sys.argv[1:] if words is None else words)
    if words and words[0] in COMMANDS:
        run_command(words[0], words[1:], f"smog {words[0]}")
    parser = _completed_parser()
    parser.parse_args(words)  # help, or what is wrong with the command's name
    parser.print_help()
    raise SystemExit(2)


def run_command(name: str, words: Sequence[str], prog: str | None = None) -> NoReturn:
    """Runs one command and ends the process.

    Args:
        name: a module of this package, such as a key of `COMMANDS`.
        words: that follow it on the command line.
        prog: what the help calls it; default: the file that was started.
    """
    command = _command(name)
    parser = argparse.ArgumentParser(prog=prog, **_description(command))
    command.add_arguments(parser)
    arguments = parser.parse_intermixed_args(_without_local_rank(words))
    with exits_on_user_error(), _read_in_part() if name in TEXTS else nullcontext():
        status = command.run(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from scale_smog import distributed

        distributed.end_process(status)
    raise SystemExit(status)


@contextmanager
def _read_in_part() -> Iterator[None]:
    """`| head` ends a text as it ends other programs: without a traceback."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


def _command(name: str) -> ModuleType:
    folder = "cli.data_tools" if name in DATA_TOOLS else "cli"
    return import_module(f"scale_smog.{folder}.{name}")


def _description(command: ModuleType) -> dict:
    return {
        "description": command.__doc__,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _completed_parser() -> argparse.ArgumentParser:
    """The parser of all commands, for the help and for a shell that completes the line."""
    parser = argparse.ArgumentParser(
        prog="smog", description="Self-supervised pre-training by SMoG (ECCV 2022)."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    is_completion = "_ARGCOMPLETE" in os.environ
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words, add_help=False)
        if is_completion:
            _command(name).add_arguments(command)
    if is_completion:
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


def _without_local_rank(words: Sequence[str]) -> list[str]:
    """deepspeed passes --local_rank=N, before a module's own words; the environment has it too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank")
    return parser.parse_known_args(words)[1]
