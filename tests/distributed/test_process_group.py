"""Who a rank is, by the names of each launcher, and what becomes of one that fails."""

import multiprocessing
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from ranks import run_on_ranks, start_forkserver
from small_recipe import small_recipe
from torch.testing._internal.distributed.fake_pg import FakeStore

from scale_smog import distributed
from scale_smog.config import EngineConfig
from scale_smog.distributed.process_group import (
    count_sharing_ranks,
    rank_environment,
    require_same_device,
)
from scale_smog.engine.fsdp import FsdpEngine
from scale_smog.errors import UserError, exits_on_user_error
from scale_smog.models.sync_batch_norm import process_group_for
from scale_smog.pretrain import in_main_folder

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


def meet_a_mistake(
    console: Path, environment: dict[str, str], who: tuple[int, ...], wait_s: float
) -> None:
    """A rank's whole process; those of `who` miss a file."""
    os.dup2(os.open(console, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= environment
    sys.modules["scale_smog.distributed.process_group"].COMMON_FAILURE_S = wait_s
    with exits_on_user_error(), distributed.process_group():
        if distributed.rank() in who:
            raise UserError("a file is missing")
        distributed.barrier()


@pytest.mark.parametrize(("who", "wait_s"), [((0, 1), 60.0), ((1,), 2.0)])
def test_what_all_ranks_meet_is_said_once_and_what_one_meets_by_that_one(tmp_path, who, wait_s):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"}
    start_forkserver()
    consoles = [tmp_path / str(rank) for rank in (0, 1)]
    ranks = [
        multiprocessing.get_context("forkserver").Process(
            target=meet_a_mistake,
            args=(console, common | {"RANK": str(rank)}, who, wait_s),
            daemon=True,
        )
        for rank, console in enumerate(consoles)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(600)
    said = [console.read_text().splitlines() for console in consoles]
    assert ranks[1].exitcode == 2 and ranks[0].exitcode not in (0, None)
    if who == (0, 1):
        assert said == [["error: a file is missing"], []]
    else:
        assert len(said[1]) == 1 and said[1][0].startswith("error: rank 1 on ")
        assert said[1][0].endswith(": a file is missing")


def threads(environment: dict[str, str]) -> int:
    """Of a lone rank's operations, which had one more than there are cores."""
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= environment | {"CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)
    distributed.init_process_group()
    return torch.get_num_threads()


@pytest.mark.parametrize("is_said", [False, True])
def test_a_rank_takes_all_cores_unless_the_user_says_otherwise(is_said):
    num_cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(num_cores + 1)} if is_said else {}
    start_forkserver()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(threads, (environment,)) == num_cores + is_said


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


def test_processes_of_tests_fork_from_one_that_has_imported_torch():
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(eval, ["'torch' in __import__('sys').modules"])


def looks(store: dist.Store, has_gpu: list[bool]) -> list[str]:
    """What each rank is told of those without a GPU; "" if it goes on."""

    def look(has_one: bool) -> str:
        try:
            require_same_device(store, has_one, len(has_gpu))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(has_gpu)) as pool:
        return list(pool.map(look, has_gpu))


def test_a_host_whose_gpu_is_gone_is_named_on_every_rank():
    for has_gpu in ([True] * 3, [False] * 3):
        assert looks(dist.HashStore(), has_gpu) == [""] * 3
    for said in looks(dist.HashStore(), [True, False, True]):
        assert said.startswith(f"torch finds no GPU on {socket.gethostname()}, ")


def timeouts_of_groups() -> list[float]:
    """Seconds that ranks wait in each kind of group of a run with long deadlines."""
    module = sys.modules["scale_smog.distributed.process_group"]
    module._timeout = timedelta(seconds=5000)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    engine = SimpleNamespace(config=EngineConfig(kind="hsdp"), device=torch.device("cpu"))
    mesh = FsdpEngine._mesh(engine)
    groups = [distributed.background_group(), process_group_for("global"), *mesh.get_all_groups()]
    backends: list[Any] = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def shape_on_simulated_ranks() -> tuple[int, ...]:
    """Of hsdp's mesh on the second of two simulated nodes, whose groups have no timeout."""
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    engine = SimpleNamespace(config=EngineConfig(kind="hsdp"), device=torch.device("cpu"))
    return tuple(FsdpEngine._mesh(engine).shape)


def test_nodes_are_simulated_too():
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(shape_on_simulated_ranks) == (2, 4)


def test_every_group_waits_as_long_as_the_run_allows():
    assert run_on_ranks(2, timeouts_of_groups) == [[5000.0] * 4] * 2


def folder_of_run(folder: Path) -> str:
    os.chdir(folder / str(distributed.rank()))
    return in_main_folder(small_recipe(Path("recipe"), "x", "run.dir=runs/a")).run.dir


def test_ranks_that_start_in_another_folder_write_into_rank_0s_run(tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    assert run_on_ranks(2, folder_of_run, tmp_path) == ["runs/a", str(tmp_path / "0/runs/a")]
