"""Ranks come together, also after restarts that agents count differently; who does not is named."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ports import free_port

from scale_smog.distributed import rendezvous as module
from scale_smog.distributed.rendezvous import leave_rendezvous, rendezvous
from scale_smog.errors import RankError, UserError


@pytest.fixture
def port(monkeypatch) -> str:
    monkeypatch.setattr("scale_smog.distributed.rendezvous.EXTRA_WAIT_S", 0.5)
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return port


@pytest.fixture
def patient(monkeypatch) -> None:
    """Connects for long: a name server that does not answer costs seconds each time."""
    connect = module._connect
    monkeypatch.setattr(module, "_connect", lambda rank, size, _: connect(rank, size, 120.0))


@pytest.fixture
def agent_store(port, patient, monkeypatch) -> dist.TCPStore:
    """The store of an elastic agent, which outlives the ranks."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return dist.TCPStore("127.0.0.1", int(port), None, True)


def come(ranks: list[int], world_size: int, timeout_s: float = 20.0) -> list[dist.Store]:
    """Stores of ranks that come at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: rendezvous(rank, world_size, timeout_s), ranks))


def have_met(stores: list[dist.Store]) -> bool:
    stores[0].set("word", "of this round")
    return all(store.get("word") == b"of this round" for store in stores)


def test_a_missing_rank_is_named_with_the_hosts_of_the_others(port, patient, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    with pytest.raises(UserError) as error:
        rendezvous(0, 3, 1.0)
    assert "rank 1, rank 2 did not come within 1 s, ranks came from " in str(error.value)
    assert " (1) of n[1-2]: " in str(error.value)


def test_a_rank_that_cannot_reach_the_first_says_so_itself(port):
    with pytest.raises(RankError, match=r"has not reached rank 0 at 127\.0\.0\.1"):
        rendezvous(1, 2, 1.0)


def test_a_port_that_is_taken_is_named(port):
    taken = dist.TCPStore("127.0.0.1", int(port), None, True)
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
        rendezvous(0, 2, 1.0)
    del taken


def test_without_rank_0_one_of_the_others_speaks(agent_store):
    with pytest.raises(RankError, match="rank 0 did not"):
        rendezvous(1, 3, 0.5)
    with pytest.raises(UserError) as error:
        rendezvous(2, 3, 0.5)
    assert not isinstance(error.value, RankError)


def test_a_round_after_a_complete_one_meets_anew(agent_store):
    first = come([0, 1, 2], 3)
    assert have_met(first)
    second = come([2, 1, 0], 3)  # whatever a launcher's counts of restarts say
    assert not second[0].check(["word"]) and have_met(second)


def test_ranks_that_find_a_round_of_the_dead_wait_for_the_next(agent_store):
    with pytest.raises(UserError):  # ranks 0 and 1 come, and are ended before the others come
        come([0, 1], 4, timeout_s=0.5)
    late = threading.Event()

    def rank_0() -> dist.Store:
        late.wait()
        return rendezvous(0, 4, 20.0)

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(rendezvous, rank, 4, 20.0) for rank in (1, 2, 3)]
        first = pool.submit(rank_0)
        while not agent_store.check(["round-1/all"]):
            assert not any(other.done() for other in others)
            time.sleep(0.01)
        late.set()
        assert have_met([first.result(), *(other.result() for other in others)])


def test_a_round_with_fewer_ranks_meets(agent_store):
    come([0, 1, 2, 3], 4)
    assert have_met(come([1, 0], 2))


def test_who_leaves_when_all_have_met_stops_nobody(port, monkeypatch):
    monkeypatch.setattr(module, "LEAVING_S", 60.0)
    stores = come([0, 1], 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    leave_rendezvous()
    assert stores[1].get("outcome") == b"complete"


def test_a_rank_that_an_agent_restarts_stops_nobody(agent_store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    leave_rendezvous()
    assert have_met(come([0, 1], 2))
