"""The demo learns as it did when its curve was recorded (benchmarks/demo_curve.py)."""

import json
import subprocess
import sys
from pathlib import Path

from scale_smog.data.prepare.demo import make_demo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROGRAM = """
import json, sys
from demo_curve import NUM_TESTED, curve, demo_recipe, faults, FILE
found = curve(demo_recipe(sys.argv[1]), NUM_TESTED)
print(json.dumps(faults(found, json.loads(FILE.read_text()))))
"""


def test_the_demos_first_80_steps_are_the_recorded_ones(tmp_path):
    """Loss within 0.05, usage of the groups after the first reset within a tenth.

    `benchmarks/demo_curve.py --breaks` shows that k-means off, beta = 0 and a frozen momentum net
    are found.
    """
    make_demo(tmp_path / "demo_data")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "demo_data")]
    ended = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == []
