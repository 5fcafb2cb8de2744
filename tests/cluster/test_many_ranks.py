"""A short version of many_ranks.py: sixteen ranks on two pretended nodes."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "many_ranks.py"


def test_sixteen_ranks_train_to_their_end_and_evaluate():
    command = [sys.executable, str(PROGRAM), "--ranks", "16", "--engine", "hsdp"]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ended.stdout.splitlines()[-1]
    assert last == "16 ranks, hsdp: train: all reached their end", ended.stdout + ended.stderr
    assert ended.returncode == 0
