"""Rehearses a recipe on pretended GPUs: what a rank needs under each engine, as a table."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from scale_smog.config import Recipe
from scale_smog.data.plan import images_per_rank
from scale_smog.errors import UserError
from scale_smog.profiling.communication_model import exposed_s
from scale_smog.profiling.hardware import MICRO, Hardware
from scale_smog.profiling.memory import plan_memory
from scale_smog.profiling.scaling_model import ENGINES
from scale_smog.profiling.workload import Workload, estimate_parts
from scale_smog.rehearsal.rank import RankReport
from scale_smog.rehearsal.runtime_build import environment
from scale_smog.small_data import fit_to_data

SPLIT_WEIGHTS = ("zero3", "fsdp", "hsdp")
TIMEOUT_S, COMPARED_S = 300.0, 50.0  # of the recipe's own engine, and of all together
NUM_AT_ONCE = 2
NOMINAL = 1


class Row(NamedTuple):
    """One engine's rank, rehearsed, beside what is predicted of it."""

    engine: str
    report: RankReport
    plan_mib: float
    host_s: float  # predicted: what it takes to launch
    gpu_s: float  # predicted: what the GPU computes
    exposed_s: float  # predicted: what it waits for other ranks

    @property
    def limit(self) -> str:
        """What the step waits for most."""
        if self.host_s > self.gpu_s + self.exposed_s:
            return "host"
        return "GPU" if self.gpu_s > self.exposed_s else "other ranks"


def rehearse(recipe: Recipe, ranks: int, machine: Hardware) -> str:
    """Rehearses the recipe's engine and, for as long as there is time, the others; a table.

    Raises:
        UserError: the recipe's engine does not step, or this machine lacks what a rehearsal needs.
    """
    if recipe.data.num_images:
        recipe, _ = fit_to_data(recipe, recipe.data.num_images)
    images_per_rank(recipe.data.global_batch, ranks)
    own, deadline = recipe.engine.kind, time.monotonic() + COMPARED_S
    others = sorted((x for x in ENGINES if x != own), key=lambda x: x == "zero3")  # it takes long
    environment(machine)  # built once, before processes ask for it
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        reports = {own: pool.submit(run_rank, recipe, ranks // 2, ranks, machine)}
        for kind in others:
            reports[kind] = pool.submit(
                run_rank, with_engine(recipe, kind), ranks // 2, ranks, machine, deadline
            )
    if problem := reports[own].result().problem:
        raise UserError(f"engine.kind={own}: {problem}")
    rows = [row_of(recipe, kind, reports[kind].result(), ranks, machine) for kind in ENGINES]
    return _text(recipe, ranks, machine, rows)


def run_rank(
    recipe: Recipe, rank: int, ranks: int, machine: Hardware, deadline: float | None = None
) -> RankReport:
    """Rehearses one rank in a process of its own, until `time.monotonic()` says `deadline`."""
    request = {
        "recipe": recipe.model_dump(mode="json"),
        "rank": rank,
        "ranks": ranks,
        "ranks_per_node": min(ranks, machine.gpus_per_node),
    }
    left_s = deadline - time.monotonic() if deadline else TIMEOUT_S
    with tempfile.TemporaryDirectory() as folder:
        asked, report = Path(folder) / "request.json", Path(folder) / "report.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "scale_smog.rehearsal.rank", str(asked), str(report)]
        errors = ""
        with suppress(subprocess.TimeoutExpired):
            result = subprocess.run(
                command,
                env=environment(machine),
                capture_output=True,
                text=True,
                timeout=max(0.1, left_s),
            )
            errors = result.stderr.strip() or f"exit status {result.returncode}"
        if report.exists():
            return RankReport.from_json(report.read_text())
        return RankReport(problem=errors.splitlines()[-1] if errors else "no time left for it")


def with_engine(recipe: Recipe, kind: str) -> Recipe:
    """The recipe under another engine; what only its own has is left out."""
    changes: dict[str, object] = {"kind": kind, "deepspeed": {}}
    if kind == "zero3":
        changes["compile"] = False
    if kind in SPLIT_WEIGHTS:
        changes["cuda_graphs"] = False
    engine = recipe.engine.model_copy(update=changes)
    return recipe.model_copy(update={"engine": engine})


def row_of(recipe: Recipe, kind: str, report: RankReport, ranks: int, machine: Hardware) -> Row:
    """An engine's report beside what is predicted of it."""
    recipe = with_engine(recipe, kind)
    if report.problem:
        return Row(kind, report, 0.0, 0.0, 0.0, 0.0)
    work = Workload.of(recipe, recipe.data.global_batch // ranks)
    parts = estimate_parts(work, machine, NOMINAL)
    without_launches = machine.model_copy(update={"op_us": (0.0, 0.0, 0.0)})
    scope = recipe.model.batch_norm
    waits = exposed_s(work, parts, ranks, kind, scope, machine, NOMINAL)
    num_started = report.num_launches + len(report.collectives)
    return Row(
        kind,
        report,
        plan_memory(recipe, ranks, min(ranks, machine.gpus_per_node)).total_mib,
        num_started * machine.at(NOMINAL)(machine.op_us) * MICRO,
        sum(estimate_parts(work, without_launches, NOMINAL).values()),
        sum(waits.values()),
    )


def _text(recipe: Recipe, ranks: int, machine: Hardware, rows: list[Row]) -> str:
    batch = recipe.data.global_batch // ranks
    return "\n".join(
        [
            f"{recipe.model.backbone} x{recipe.model.width}, {batch} images a rank, rank "
            f"{ranks // 2} of {ranks} on {machine.name}",
            "Counted in a rehearsal on a pretended GPU; times are predicted, nothing is measured.",
            "",
            f"  {'engine':<7}{'peak MiB':>9}{'plan MiB':>9}{'launches':>9}{'collectives':>12}"
            f"{'sent MiB':>9}{'waits':>6}{'host ms':>8}{'GPU ms':>7}"
            f"{'comm ms':>9}  limited by",
            *(format_row(row, recipe.engine.kind) for row in rows),
            "",
            *_details(next(row for row in rows if row.engine == recipe.engine.kind)),
            "Peak: of torch's allocator; the libraries' workspaces and NCCL's buffers come on top.",
            "Of a step. launches: kernels and copies that the host starts, which takes host ms; "
            "waits: for the GPU, by the host; comm ms: messages that no computation hides. The "
            "longest limits the step; its seconds are predicted by smog throughput.",
        ]
    )


def format_row(row: Row, own: str) -> str:
    """A line of the table; the recipe's `own` engine is marked."""
    name = f"{'*' if row.engine == own else ' '} {row.engine:<7}"
    report = row.report
    if report.problem:
        return f"{name} {report.problem}"
    return (
        f"{name}{report.peak_mib:>9.0f}{row.plan_mib:>9.0f}{report.num_launches:>9}"
        f"{len(report.collectives):>12}{report.sent_mib:>9.0f}{report.num_waits:>6}"
        f"{row.host_s * 1e3:>8.1f}{row.gpu_s * 1e3:>7.1f}{row.exposed_s * 1e3:>9.1f}  {row.limit}"
    )


def _details(row: Row) -> list[str]:
    """Collectives and waits of the recipe's own engine, by what they are."""
    kinds = Counter((x.kind, x.ranks, x.device) for x in row.report.collectives)
    collectives = ", ".join(
        f"{num} {kind} over {ranks}{'' if device == 'cuda' else ' on the CPU'}"
        for (kind, ranks, device), num in kinds.most_common()
    )
    waits = ", ".join(f"{num} at {place}" for place, num in row.report.waits.items())
    return [f"* collectives: {collectives or 'none'}", f"  waits: {waits or 'none'}"]
