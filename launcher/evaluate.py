"""Evaluates a checkpoint: `evaluate.py EVALUATION CHECKPOINT [section.key=value ...] [--compare]`.

CHECKPOINT is a run folder (its newest checkpoint) or one of its `checkpoints/step-*` folders.
Overrides change the run's recipe (`evaluation.k=200`, `data.path=another/set`) or the protocol
(`linear.setting=swav`, `finetune.share=0.1`, `segmentation.path=VOCdevkit/VOC2012`).
`groups` takes several checkpoints, and .npz files with `features` and `labels`, and overlays them.
The same command goes on where it was interrupted.
"""

import argparse

from scale_smog import distributed
from scale_smog.errors import exits_on_user_error
from scale_smog.evaluation.program import PROGRAMS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", choices=PROGRAMS)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT or section.key=value")
    parser.add_argument("--compare", action="store_true", help="print the paper's rows beside ours")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; unused
    arguments = parser.parse_intermixed_args()
    overrides = [argument for argument in arguments.arguments if "=" in argument]
    checkpoints = [argument for argument in arguments.arguments if "=" not in argument]
    with exits_on_user_error():
        PROGRAMS[arguments.evaluation](checkpoints, overrides, arguments.compare)


if __name__ == "__main__":
    main()
    distributed.end_process()
