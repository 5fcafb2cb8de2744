"""Looks before a run, `check.py RECIPE [section.key=value ...]`, or at one, `--doctor RUN_DIR`.

RECIPE is checked on all ranks of the launcher that starts it (deepspeed, torchrun, srun): versions,
dataset, run folder, clocks, memory, links between hosts. A table; exit status 0 or 2.
--doctor says which checkpoints of a run are whole, and why the others are not; exit status 0 only
if the newest one is.
"""

import argparse
from pathlib import Path

from scale_smog import distributed, load_recipe
from scale_smog.checkpoint.manifest import find_damage, list_checkpoints
from scale_smog.errors import UserError, exits_on_user_error
from scale_smog.preflight import check


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="YAML file, such as recipes/r50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--doctor", metavar="RUN_DIR", type=Path)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    if bool(arguments.recipe) == bool(arguments.doctor):
        parser.error("give a RECIPE, or --doctor RUN_DIR")
    with exits_on_user_error():
        if arguments.doctor:
            return doctor(arguments.doctor)
        return check(load_recipe(arguments.recipe, arguments.overrides))


def doctor(run_dir: Path) -> int:
    """Prints a line a checkpoint, newest first; returns the exit status."""
    folders = list_checkpoints(run_dir)[::-1]
    if not folders:
        raise UserError(f"no checkpoint in {run_dir}: give a run's folder, such as runs/demo")
    problems = [find_damage(folder) for folder in folders]
    for folder, problem in zip(folders, problems, strict=True):
        print(f"{folder.name}  {'NOT WHOLE: ' + problem if problem else 'whole'}")
    whole = [f.name for f, problem in zip(folders, problems, strict=True) if problem is None]
    print(f"the run goes on from {whole[0]}" if whole else "no checkpoint is whole")
    return int(problems[0] is not None)


if __name__ == "__main__":
    status = main()
    distributed.end_process(status)
    raise SystemExit(status)
