"""The benchmarks: one way to call them, one form of what they claim, and none is forgotten."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
NO_PROGRAMS = ("compare", "methods", "run_all")
PROGRAMS = sorted(p for p in FOLDER.glob("*.py") if p.stem not in NO_PROGRAMS)
# A GPU; hours of training; what training is compared with.
NOT_RUN_BY_RUN_ALL = {"gpu_suite", "ablations", "cifar10", "figure5", "learning", "demo_curve"}
NOT_RUN_BY_RUN_ALL |= {"rankme", "long_run", "beside_dali"}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_a_benchmark_has_a_quick_case_and_ends_with_a_claim(path):
    text = path.read_text()
    assert "parse_arguments(" in text or '"--quick"' in text
    assert "claim(" in text or '{"claim":' in text or "record.add(part=" in text


def test_run_all_knows_every_benchmark():
    import run_all

    assert {p.stem for p in PROGRAMS} == set(run_all.NEEDS) | NOT_RUN_BY_RUN_ALL


def test_a_claim_is_one_json_line(capsys):
    import compare

    assert compare.claim("s, ours against theirs", 2.0, 3.0) == 1.5
    said = json.loads(capsys.readouterr().out)
    assert said == {"claim": "s, ours against theirs", "ours": 2.0, "peer": 3.0, "ratio": 1.5}


def test_streams_are_opened_anew_at_every_turn_and_warmed_up():
    import compare

    opened = []

    def stream():
        opened.append(0)
        for _ in range(5):
            opened[-1] += 1
            yield

    seconds = compare.interleaved_streams({"a": stream}, num_warm_up=2, num_items=3, rounds=4)
    assert opened == [5] * 4 and seconds["a"] < 0.1


def test_a_program_that_fails_is_reported_and_not_left_out(tmp_path):
    import sys

    import run_all

    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit('no peer here')")
    (row,) = run_all.run("broken", [sys.executable, str(path)])
    assert row == {"program": "broken", "claim": "not measured: no peer here"}
