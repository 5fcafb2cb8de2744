"""Evaluates a checkpoint: `smog evaluate EVALUATION CHECKPOINT [section.key=value ...]`.

CHECKPOINT is a run folder (its newest checkpoint) or one of its `checkpoints/step-*` folders.
Overrides change the run's recipe (`evaluation.k=200`, `data.path=another/set`) or the protocol
(`linear.setting=swav`, `finetune.share=0.1`, `segmentation.path=VOCdevkit/VOC2012`).
`groups` takes several checkpoints, and .npz files with `features` and `labels`, and overlays them.
Interrupted, the same command resumes evaluations that train (`linear` but for logistic, `finetune`,
`segmentation`, `detection`) and starts the others over.
"""

import argparse
import os

EVALUATIONS = ("knn", "linear", "finetune", "segmentation", "detection", "groups", "features")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The evaluation, checkpoints and overrides."""
    parser.add_argument("evaluation", choices=EVALUATIONS)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT or section.key=value")
    parser.add_argument("--compare", action="store_true", help="print the paper's rows beside ours")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from scale_smog.evaluation.program import PROGRAMS

    # A folder may be called lr=0.1, and a setting is no folder.
    checkpoints = [x for x in arguments.arguments if "=" not in x or os.path.exists(x)]
    overrides = [x for x in arguments.arguments if x not in checkpoints]
    PROGRAMS[arguments.evaluation](checkpoints, overrides, arguments.compare)
    return 0
