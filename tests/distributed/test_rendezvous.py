"""Ranks that do not come are named."""

import base64
import json
import subprocess
import sys

import pytest
from hosts import free_port

from scale_smog.distributed.rendezvous import meet
from scale_smog.errors import UserError


def test_a_missing_rank_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(UserError, match=r"rank 1, rank 2 did not come within 1 s"):
        meet(0, 3, 1.0)


def test_its_host_is_named_where_the_launcher_knows_it(monkeypatch):
    from scale_smog.distributed import rendezvous as meeting

    slots = {"a": [0, 1], "b": [0, 1]}
    option = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_child()!r}])"
    started = [sys.executable, "-c", script, f"--world_info={option}"]
    ended = subprocess.run(started, capture_output=True, text=True)
    assert ended.stdout.split() == ["a", "a", "b", "b"], ended.stderr
    assert meeting._hosts_of_ranks() == []  # the parent of this process is no such launcher


def _child() -> str:
    return (
        "from scale_smog.distributed.rendezvous import _hosts_of_ranks; print(*_hosts_of_ranks())"
    )


def test_a_rank_that_cannot_reach_the_first_says_so(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(UserError, match=r"has not reached rank 0 at 127\.0\.0\.1"):
        meet(1, 2, 1.0)
    assert "error: " in capsys.readouterr().err
