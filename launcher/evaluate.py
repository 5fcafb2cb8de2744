"""Evaluates a checkpoint: `evaluate.py {knn,groups} CHECKPOINT [section.key=value ...]`.

CHECKPOINT is a run folder (its newest checkpoint) or one of its `checkpoints/step-*` folders.
Overrides change the run's recipe, such as `evaluation.k=200` or `data.path=another/set`.
`groups` takes several checkpoints, and .npz files with `features` and `labels`, and overlays them.
"""

import argparse

from scale_smog import distributed
from scale_smog.errors import exits_on_user_error
from scale_smog.evaluation.program import evaluate_groups, evaluate_knn

EVALUATIONS = {"knn": evaluate_knn, "groups": evaluate_groups}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", choices=EVALUATIONS)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT or section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    overrides = [argument for argument in arguments.arguments if "=" in argument]
    checkpoints = [argument for argument in arguments.arguments if "=" not in argument]
    with exits_on_user_error():
        EVALUATIONS[arguments.evaluation](checkpoints, overrides)


if __name__ == "__main__":
    main()
    distributed.end_process()
