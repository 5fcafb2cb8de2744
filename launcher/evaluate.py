"""Evaluates a checkpoint: `evaluate.py knn CHECKPOINT [section.key=value ...]`.

CHECKPOINT is a run folder (its newest checkpoint) or one of its `checkpoints/step-*` folders.
Overrides change the run's recipe, such as `evaluation.k=200` or `data.path=another/set`.
"""

import argparse

from scale_smog import distributed
from scale_smog.errors import exits_on_user_error
from scale_smog.evaluation.program import evaluate_knn

EVALUATIONS = {"knn": evaluate_knn}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", choices=EVALUATIONS)
    parser.add_argument("checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    with exits_on_user_error():
        EVALUATIONS[arguments.evaluation](arguments.checkpoint, arguments.overrides)


if __name__ == "__main__":
    main()
    distributed.end_process()
