"""Who a rank is, by the names of each launcher, and what becomes of one that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port, run_on_ranks

from scale_smog import distributed
from scale_smog.distributed.process_group import count_sharing_ranks, rank_environment
from scale_smog.errors import UserError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*NAMES, "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "")  # so that what a test puts there is removed after it
        monkeypatch.delenv(name)


def test_plain_python_is_one_rank():
    assert rank_environment() == {
        "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
    }  # fmt: skip


def test_deepspeeds_name_for_the_ranks_of_a_host_is_understood(monkeypatch):
    of_deepspeed = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    of_deepspeed["LOCAL_WORLD_SIZE"] = "1"  # a run of one process before it has left this
    for name, value in {**of_deepspeed, "MASTER_ADDR": "host-a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert rank_environment()["LOCAL_WORLD_SIZE"] == 2
    assert distributed.ranks_per_node() == 2


def test_srun_s_names_are_understood(monkeypatch):
    of_srun = {"STEP_ID": "0", "PROCID": "9", "NTASKS": "16", "LOCALID": "1"}
    for name, value in {**of_srun, "STEP_TASKS_PER_NODE": "8(x2)"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "host-a")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert rank_environment() == {
        "RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "RANK=x in the environment is not a number"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK=1 with LOCAL_WORLD_SIZE=1"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc in the environment is not a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": ""}, "MASTER_PORT= in the environment is not a number"),
    ],
)
def test_an_impossible_environment_is_named(monkeypatch, environment, words):
    usual = {"WORLD_SIZE": "2", "MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}
    for name, value in (usual | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        rank_environment()


FAILING = """
import sys
from scale_smog import distributed
from scale_smog.errors import UserError, exits_on_user_error
sys.modules['scale_smog.distributed.process_group'].COMMON_FAILURE_S = 2.0
with exits_on_user_error(), distributed.process_group():
    if str(distributed.rank()) in sys.argv[1]:
        raise UserError("a file is missing")
    distributed.barrier()
"""


@pytest.mark.parametrize("who", ["01", "1"])
def test_what_all_ranks_meet_is_said_once_and_what_one_meets_by_that_one(who):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["CUDA_VISIBLE_DEVICES"] = ""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, who],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=60)[1].splitlines() for rank in ranks]
    assert ranks[1].returncode == 2 and ranks[0].returncode != 0
    if who == "01":
        assert said == [["error: a file is missing"], []]
    else:
        assert len(said[1]) == 1 and said[1][0].startswith("error: rank 1 on ")
        assert said[1][0].endswith(": a file is missing")


def threads(**environment: str) -> int:
    """Of a lone rank's operations."""
    script = "import torch; from scale_smog import distributed; distributed.init_process_group()"
    script += "; print(torch.get_num_threads())"
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    inherited |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    return int(subprocess.check_output(command, env=inherited | environment, text=True))


def test_a_rank_takes_all_cores_unless_the_user_says_otherwise():
    num_cores = len(os.sched_getaffinity(0))
    assert threads() == num_cores
    assert threads(OMP_NUM_THREADS="1") == 1


def sharing(cores: list[list[int]]) -> int:
    os.sched_setaffinity(0, cores[distributed.rank()])
    count_sharing_ranks()
    return distributed.num_sharing_ranks()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_ranks_with_cores_of_their_own_share_with_nobody():
    a, b, *_ = sorted(os.sched_getaffinity(0))
    assert run_on_ranks(3, sharing, [[a], [a, b], [b]]) == [2, 3, 2]
    assert run_on_ranks(2, sharing, [[a], [b]]) == [1, 1]


def asks_rank_0(folder: Path) -> list[str]:
    """What rank 0 returns, and what it meets, as this rank is told."""
    told = [distributed.call_on_main(lambda: f"rank {distributed.rank()}")]
    for function in (lambda: Path(folder / "gone").read_text(), refuse):
        try:
            distributed.call_on_main(function)
        except (OSError, UserError) as error:
            told.append(f"{type(error).__name__} {error}")
    return told


def refuse() -> None:
    raise UserError("no such dataset")


def test_what_rank_0_reads_or_meets_all_ranks_are_told(tmp_path):
    first, second = run_on_ranks(2, asks_rank_0, tmp_path)
    assert first == second and first[0] == "rank 0" and first[2] == "UserError no such dataset"
    assert first[1].startswith("OSError rank 0 on ") and "gone: No such file" in first[1]
