"""Evaluates a checkpoint: `smog evaluate EVALUATION CHECKPOINT [section.key=value ...]`.

CHECKPOINT is a run folder (its newest checkpoint) or one of its `checkpoints/step-*` folders.
Overrides change the run's recipe (`evaluation.k=200`, `data.path=another/set`) or the protocol
(`linear.setting=swav`, `finetune.share=0.1`, `segmentation.path=VOCdevkit/VOC2012`).
`groups` takes several checkpoints, and .npz files with `features` and `labels`, and overlays them.
The same command goes on where it was interrupted.
"""

import argparse

EVALUATIONS = ("knn", "linear", "finetune", "segmentation", "detection", "groups", "features")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The evaluation, checkpoints and overrides."""
    parser.add_argument("evaluation", choices=EVALUATIONS)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT or section.key=value")
    parser.add_argument("--compare", action="store_true", help="print the paper's rows beside ours")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from scale_smog.evaluation.program import PROGRAMS

    overrides = [word for word in arguments.arguments if "=" in word]
    checkpoints = [word for word in arguments.arguments if "=" not in word]
    PROGRAMS[arguments.evaluation](checkpoints, overrides, arguments.compare)
    return 0
