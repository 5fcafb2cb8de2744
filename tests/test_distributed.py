"""Who a rank is, by the names of each launcher."""

import pytest

from scale_smog import distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*NAMES, "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_plain_python_is_one_rank():
    assert distributed._rank_environment() == {
        "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
    }  # fmt: skip


def test_deepspeeds_name_for_the_ranks_of_a_host_is_understood(monkeypatch):
    of_deepspeed = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    for name, value in {**of_deepspeed, "MASTER_ADDR": "host-a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed._rank_environment()["LOCAL_WORLD_SIZE"] == 2
    assert distributed.ranks_per_node() == 2


def test_srun_s_names_are_understood(monkeypatch):
    of_srun = {"STEP_ID": "0", "PROCID": "9", "NTASKS": "16", "LOCALID": "1"}
    for name, value in {**of_srun, "STEP_TASKS_PER_NODE": "8(x2)"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "host-a")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert distributed._rank_environment() == {
        "RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 8,
    }  # fmt: skip
