"""Log files and the console when several ranks run, and when one of them fails."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.runtime.rank_logs import FAILURE_FILE, RankLogs, console


def fail_one_after_the_other(folder: Path) -> int:
    """Rank 1 fails; then rank 0 does, because rank 1 is gone."""
    with open(folder / f"console-{distributed.rank()}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with RankLogs() as logs:
            logs.open(folder)
            print("a line of rank", distributed.rank())
            os.system("echo a line of a library")
            print("to everybody", distributed.rank(), file=console(), flush=True)
            if distributed.rank() == 1:
                raise ValueError("the cause")
            while not (folder / "logs" / FAILURE_FILE).exists():
                time.sleep(0.01)
            raise ConnectionError("closed by the other side")
    except SystemExit as end:
        sys.stdout.flush()
        return int(end.code or 0)
    return -1


def log_on_a_full_disk(folder: Path) -> bool:
    """What rank 0 says, and the error that ends it, though its file takes nothing."""
    with open(folder / f"console-{distributed.rank()}", "w") as file:
        os.dup2(file.fileno(), 1)
    with suppress(UserError), RankLogs() as logs:
        logs.open(folder)
        print("step 1")
        print("step 2", flush=distributed.is_main())
        raise UserError("the end")
    return True


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path):
    (tmp_path / "logs").mkdir()
    for rank in (0, 1):
        (tmp_path / "logs" / f"rank-0000{rank}.log").symlink_to("/dev/full")
    assert run_on_ranks(2, log_on_a_full_disk, tmp_path) == [True, True]
    assert (tmp_path / "console-0").read_text() == "step 1\nstep 2\n"


def test_the_first_error_is_shown_in_full_and_the_ones_that_follow_from_it_are_not(tmp_path):
    assert run_on_ranks(2, fail_one_after_the_other, tmp_path) == [1, 1]
    consoles = [(tmp_path / f"console-{rank}").read_text() for rank in (0, 1)]
    assert "rank 1 on" in consoles[1] and "Traceback" in consoles[1]
    assert consoles[1].rstrip().endswith("ValueError: the cause")
    assert "closed" not in consoles[0] and "a line of rank 0" in consoles[0]
    assert "to everybody 1" in consoles[1] and "a line" not in consoles[1]
    logs = [(tmp_path / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert "a line of rank 0" in logs[0] and "ConnectionError" in logs[0]
    for words in ("a line of rank 1", "a line of a library", "ValueError: the cause"):
        assert words in logs[1]
