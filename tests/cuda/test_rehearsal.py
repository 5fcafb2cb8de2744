"""torch's CUDA code runs a step without a GPU: devices, waits, launches, collectives, memory."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.profiling.hardware import load_hardware
from scale_smog.rehearsal import runtime_build
from scale_smog.rehearsal.program import format_row, rehearse, row_of
from scale_smog.rehearsal.rank import RankReport
from scale_smog.rehearsal.runtime_build import build_runtime, environment, missing_requirement

PROGRAM = Path(__file__).with_name("rehearsed_ranks.py")
ENGINES = ("ddp", "fsdp")
H100 = load_hardware("h100")
MOST_LAUNCHES = {"ddp": 1350, "fsdp": 1600}  # of ResNet-50 x1
MOST_COLLECTIVES = 200

needs_runtime = pytest.mark.skipif(
    missing_requirement() is not None, reason=str(missing_requirement())
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, RankReport]]:
    """Of every engine: a tiny net's ranks by their numbers, with something planted, ResNet-50's."""
    out = tmp_path_factory.mktemp("reports") / "reports.json"
    process = subprocess.run(
        [sys.executable, PROGRAM, out, *ENGINES],
        env=environment(H100),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert out.exists(), process.stderr[-2000:]
    return {
        engine: {name: RankReport.from_json(json.dumps(x)) for name, x in texts.items()}
        for engine, texts in json.loads(out.read_text()).items()
    }


@needs_runtime
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_runs_without_mixed_devices_and_waits_at_most_once(reports, engine):
    for rank in ("0", "11", "63", "ResNet-50"):
        report = reports[engine][rank]
        assert not report.problem and report.num_waits <= 1, (rank, report.problem, report.waits)
        assert 0 < report.num_launches <= MOST_LAUNCHES[engine]
        assert 0 < len(report.collectives) <= MOST_COLLECTIVES
        assert report.peak_mib > 0


@needs_runtime
@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_issue_the_same_collectives_in_the_same_order(reports, engine):
    first, *others = (reports[engine][rank].collectives for rank in ("0", "11", "63"))
    assert first and all(each == first for each in others)


@needs_runtime
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_planted_is_found(reports, engine):
    sound, planted = reports[engine]["11"], reports[engine]
    assert "devices cpu, cuda" in planted["a tensor left on the CPU"].problem
    assert planted["an .item()"].num_waits == sound.num_waits + 1
    place = next(iter(Counter(planted["an .item()"].waits) - Counter(sound.waits)))
    assert "loop.py" in place
    assert planted["a collective on one rank"].collectives != sound.collectives


@needs_runtime
def test_ddp_sends_its_gradients_once_around_the_ring(reports):
    collectives = reports["ddp"]["ResNet-50"].collectives
    gradients = sum(x.bytes for x in collectives if x.kind == "all_reduce" and x.bytes > 2**20)
    plan_bytes = 4 * 28.5e6  # ResNet-50 with its heads
    assert gradients == pytest.approx(plan_bytes, rel=0.05)


@needs_runtime
def test_the_suite_for_a_gpu_runs_and_what_it_knows_survives_being_killed(tmp_path):
    out, root = tmp_path / "claims.jsonl", PROGRAM.parents[2]
    suite = [str(root / "benchmarks" / "gpu_suite.py"), "--quick", "--out", str(out)]
    parts = ["--parts", "waiting", "batch_norm", "exactness", "graphs"]
    process = subprocess.Popen(
        [sys.executable, PROGRAM.with_name("on_pretended_gpu.py"), *suite, *parts],
        env=environment(H100) | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and out_lines(out) < 4:
        time.sleep(0.05)
    process.kill()
    process.wait()
    device, *claims = map(json.loads, out.read_text().splitlines())
    assert device["device"] == H100.name
    assert [claim["part"] for claim in claims[:3]] == ["waiting", "batch_norm", "batch_norm"]
    assert claims[0]["ours"] == 1 and not any("not_measured" in claim for claim in claims)


def out_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@needs_runtime
def test_the_runtime_is_built_once_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build_runtime()
    built_at = library.stat().st_mtime_ns
    assert tmp_path in library.parents and build_runtime() == library
    assert library.stat().st_mtime_ns == built_at


def test_what_a_machine_lacks_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(runtime_build.shutil, "which", lambda _: None)
    monkeypatch.setattr(runtime_build.torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="apt-get install gcc"):
        build_runtime()
    monkeypatch.setattr(runtime_build.torch.version, "cuda", None)
    with pytest.raises(UserError, match="needs a torch built for CUDA 13"):
        build_runtime()


@needs_runtime
def test_ranks_that_do_not_divide_the_batch_are_a_users_error():
    recipe = Recipe.model_validate({"run": {"steps": 1}, "data": {"path": "", "global_batch": 64}})
    with pytest.raises(UserError, match=r"data\.global_batch=64"):
        rehearse(recipe, 10, H100)


def test_a_line_of_the_table_says_what_limits_a_step():
    data = {"path": "", "global_batch": 2048}
    recipe = Recipe.model_validate({"run": {"steps": 1}, "data": data})
    report = RankReport(kernels=10**6, peak_mib=1234.5)
    line = format_row(row_of(recipe, "ddp", report, 64, H100), "ddp")
    assert line.startswith("* ddp") and "1000000" in line and line.endswith("host")
    few = recipe.model_copy(update={"data": recipe.data.model_copy(update={"global_batch": 8})})
    assert row_of(few, "ddp", RankReport(kernels=1500), 1, H100).limit == "host"  # launches of x1
    refused = row_of(recipe, "hsdp", RankReport(problem="no whole nodes"), 64, H100)
    assert format_row(refused, "ddp").endswith("no whole nodes")
