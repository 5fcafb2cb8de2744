"""Looks before a run, `smog check RECIPE [section.key=value ...]`, or at one, `--doctor RUN_DIR`.

RECIPE is checked on all ranks of the launcher that starts it (deepspeed, torchrun, srun): versions,
dataset, run folder, clocks, memory, links between hosts. A table; exit status 0 or 2.
--rehearse needs neither GPUs nor data: it steps one rank of --ranks on a pretended --hardware GPU
and says what memory, launches, collectives and waits each engine takes.
--doctor says which checkpoints of a run are whole, and why the others are not; exit status 0 only
if the newest one is.
"""

import argparse
from pathlib import Path

from scale_smog.cli.arguments import add_recipe
from scale_smog.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides, or a run."""
    add_recipe(parser, nargs="?")
    parser.add_argument("--doctor", metavar="RUN_DIR", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="step one rank on a pretended GPU")
    parser.add_argument("--ranks", type=int, default=64, help="of the rehearsal (default 64)")
    parser.add_argument(
        "--hardware", default="h100", help="of the rehearsal: h100, h200, a100 or your own file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Checks the recipe, or the run's checkpoints."""
    if bool(arguments.recipe) == bool(arguments.doctor):
        raise UserError("give a RECIPE, or --doctor RUN_DIR")
    if arguments.doctor:
        return doctor(arguments.doctor)
    from scale_smog.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.rehearse:
        if arguments.ranks < 1:
            raise UserError(f"--ranks is {arguments.ranks}; it must be 1 or more")
        from scale_smog.profiling.hardware import load_hardware
        from scale_smog.rehearsal.program import rehearse

        print(rehearse(recipe, arguments.ranks, load_hardware(arguments.hardware)))
        return 0
    from scale_smog.preflight.checks import check

    return check(recipe)


def doctor(run_dir: Path) -> int:
    """Prints a line a checkpoint, newest first; returns the exit status."""
    from scale_smog.checkpoint.manifest import find_damage, list_checkpoints

    folders = list_checkpoints(run_dir)[::-1]
    if not folders:
        raise UserError(f"no checkpoint in {run_dir}: give a run's folder, such as runs/demo")
    problems = [find_damage(folder) for folder in folders]
    for folder, problem in zip(folders, problems, strict=True):
        print(f"{folder.name}  {'NOT WHOLE: ' + problem if problem else 'whole'}")
    whole = [f.name for f, problem in zip(folders, problems, strict=True) if problem is None]
    print(f"the run goes on from {whole[0]}" if whole else "no checkpoint is whole")
    return int(problems[0] is not None)
