"""Ranks of some engines, one after the other, in a process on the pretended runtime.

    LD_PRELOAD=... python rehearsed_ranks.py REPORTS.json ENGINE...

Of each engine: a rank with the paper's ResNet-50, whose step is counted; ranks with a tiny net,
whose steps are compared; and three of these that have something planted, which a rehearsal must
find.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from scale_smog import loss as losses
from scale_smog.config import Recipe
from scale_smog.rehearsal.rank import RankReport, rehearse_rank

RANKS, WORLD, PER_NODE = (0, 11, 63), 64, 8
LOSS = losses.group_contrastive_loss


def recipe_of(engine: str, backbone: str) -> Recipe:
    """A step on few small images."""
    return Recipe.model_validate(
        {
            "run": {"steps": 10},
            "data": {"path": "", "loader": "synthetic", "global_batch": 4 * WORLD, "large_px": 64},
            "grouping": {"init": "random", "kmeans": False, "num_groups": 100, "bank_steps": 4},
            "engine": {"kind": engine},
            "model": {"backbone": backbone},
        }
    )


def left_on_the_cpu(p: Any, groups: Any, *rest: Any) -> Any:
    return LOSS(p, groups.cpu(), *rest)


def reads_a_number(*args: Any) -> Any:
    loss = LOSS(*args)
    assert loss.item() == 0.0
    return loss


def asks_the_others(*args: Any) -> Any:
    dist.all_reduce(torch.zeros(1, device=args[0].device))
    return LOSS(*args)


PLANTED: dict[str, Callable[..., Any]] = {
    "a tensor left on the CPU": left_on_the_cpu,
    "an .item()": reads_a_number,
    "a collective on one rank": asks_the_others,
}


def report_of(recipe: Recipe, rank: int) -> RankReport:
    try:
        return rehearse_rank(recipe, rank, WORLD, PER_NODE)
    except RuntimeError as error:
        return RankReport(problem=str(error).splitlines()[0])
    finally:
        dist.destroy_process_group()


def reports_of(engine: str) -> dict[str, RankReport]:
    """The tiny net's by rank or by what is planted, and "ResNet-50"."""
    tiny = recipe_of(engine, "resnet_tiny")
    reports = {str(rank): report_of(tiny, rank) for rank in RANKS}
    for name, planted in PLANTED.items():
        with mock.patch.object(losses, "group_contrastive_loss", planted):
            reports[name] = report_of(tiny, RANKS[1])
    return reports | {"ResNet-50": report_of(recipe_of(engine, "resnet50"), RANKS[1])}


def main() -> None:
    found = {
        engine: {name: asdict(report) for name, report in reports_of(engine).items()}
        for engine in sys.argv[2:]
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
