"""A program that another one runs has the time that it needs when it is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale_smog.runtime.child import run_child

PARENT = (
    "import sys; from scale_smog.runtime.child import run_child; sys.exit(run_child(sys.argv[1:]))"
)
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open(sys.argv[1], "a").write("saved ")
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1], "w").write("listens ")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_saves_before_its_parent_ends(tmp_path, number):
    said: Path = tmp_path / "said"
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", SAVES, str(said)]
    parent = subprocess.Popen(command, start_new_session=True)
    while not (said.exists() and said.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    os.killpg(parent.pid, number)  # as Ctrl-C in a terminal does, or its end
    assert parent.wait() == 0 and said.read_text() == "listens saved "


def test_a_signal_that_ended_the_child_is_its_status_as_a_shell_has_it():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_child(["sh", "-c", "kill -9 $$"]) == 137
    assert run_child(["sh", "-c", "exit 3"]) == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
