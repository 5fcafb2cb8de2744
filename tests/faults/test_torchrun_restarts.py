"""Restarts by torchrun on several nodes."""

from pathlib import Path

from elastic import Agents

# The ranks do not meet before one of them is killed; then each says in one piece whom it has met.
# Those that are ended before have not yet imported torch.
MEETING = """
import sys, time
from pathlib import Path

while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
from scale_smog import distributed
with distributed.process_group(600):
    ranks = distributed.gather_objects(distributed.rank())
    print("met " + " ".join(map(str, ranks)) + "\\n", end="")
"""


def test_ranks_meet_again_when_agents_count_their_restarts_differently(tmp_path: Path):
    program = tmp_path / "meeting.py"
    program.write_text(MEETING)
    killed = tmp_path / "killed"
    agents = Agents(tmp_path, 2, 1, [str(program), str(killed)])
    try:
        agents.wait_until(lambda: len(agents.starts(1)) == 1)
        agents.kill_rank()
        killed.touch()
        assert agents.wait() == [0, 0]
        assert sorted(agents.restart_counts()) == [0, 1]
        assert all(agents.said(number).count("met 0 1") == 1 for number in (0, 1))
    finally:
        agents.end()
