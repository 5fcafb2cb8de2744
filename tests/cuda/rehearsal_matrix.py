"""Every engine under every case, rehearsed: `rehearsal_matrix.py [--engines ...] [--cases ...]`.

A line each: kernels, copies, collectives, waits, peak MiB and plan. Exit status 1 if one does not
step, waits more than it may, issues other collectives on other ranks, or is far from its plan.
"""

import argparse
from typing import Any

from scale_smog.config import Recipe
from scale_smog.profiling.hardware import load_hardware
from scale_smog.profiling.memory import plan_memory
from scale_smog.profiling.scaling_model import ENGINES
from scale_smog.rehearsal.program import run_rank
from scale_smog.rehearsal.rank import RankReport

RANK, COMPARED = 11, (0, 1, 63)  # the order of collectives is compared in the first case
BATCH = 32
MOST_WAITS = dict.fromkeys(ENGINES, 1) | {"zero3": 4}  # DeepSpeed's own three
FAR_FROM_PLAN = 0.10
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "x1": {},
    "x4": {"model": {"width": 4}},
    "Swin-T": {"model": {"backbone": "swin_tiny", "dim": 256}, "optimizer": {"name": "adamw"}},
    "multi-crop": {"data": {"num_small_crops": 4}},
    "accumulate": {"engine": {"accumulate": 2}},
    "checkpointing": {"engine": {"activation_checkpointing": True}},
    "bf16 reduction": {"engine": {"reduce_precision": "bf16"}},
    "batch norm of a node": {"model": {"batch_norm": "node"}},
    "batch norm of 16": {"model": {"batch_norm": 16}},
    "batch norm of a rank": {"model": {"batch_norm": "local"}},
    "adamw": {"optimizer": {"name": "adamw"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "clipped": {"optimizer": {"clip_norm": 1.0}},
    "fp32": {"engine": {"precision": "fp32"}},
}


def recipe_of(engine: str, case: str, ranks: int) -> Recipe:
    base: dict[str, dict[str, Any]] = {
        "run": {"steps": 10},
        "data": {"path": "", "loader": "synthetic", "global_batch": BATCH * ranks},
        "grouping": {"init": "random", "kmeans": False, "bank_steps": 4},
        "engine": {"kind": engine},
    }
    changes = CASES[case]
    sections = {k: base.get(k, {}) | changes.get(k, {}) for k in base | changes}
    return Recipe.model_validate(sections)


def faults_of(engine: str, report: RankReport, planned_mib: float) -> list[str]:
    if report.problem:
        return [report.problem]
    faults = []
    if report.num_waits > MOST_WAITS[engine]:
        faults.append(f"waits: {report.waits}")
    if abs(report.peak_mib / planned_mib - 1) > FAR_FROM_PLAN:
        faults.append(f"{report.peak_mib / planned_mib - 1:+.0%} from the plan")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ranks", type=int, default=64)
    arguments = parser.parse_args()
    machine, num_faults = load_hardware("h100"), 0
    for case in arguments.cases:
        for engine in arguments.engines:
            recipe = recipe_of(engine, case, arguments.ranks)
            report = run_rank(recipe, RANK, arguments.ranks, machine)
            planned_mib = plan_memory(recipe, arguments.ranks).total_mib
            faults = faults_of(engine, report, planned_mib)
            if case == "x1":
                others = [run_rank(recipe, rank, arguments.ranks, machine) for rank in COMPARED]
                if any(other.collectives != report.collectives for other in others):
                    faults.append("ranks issue different collectives")
            num_faults += bool(faults)
            print(
                f"{case:<21}{engine:<6}{report.kernels:>6} kernels{report.copies:>5} copies"
                f"{len(report.collectives):>5} collectives{report.num_waits:>3} waits"
                f"{report.peak_mib:>7.0f} MiB of {planned_mib:.0f}  {'; '.join(faults)}",
                flush=True,
            )
    return int(num_faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
