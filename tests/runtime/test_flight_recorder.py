"""Where ranks begin different collectives, the one that differs is named with its number."""

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.runtime import flight_recorder
from scale_smog.runtime.flight_recorder import Collective, first_difference


def begun(*names: str, first: int = 1) -> list[Collective]:
    return [Collective("0", number, name) for number, name in enumerate(names, start=first)]


def test_a_rank_that_leaves_one_out_is_named_with_its_number():
    usual = begun("all_reduce [4]", "all_reduce [8]", "all_gather [2]")
    odd = begun("all_reduce [4]", "all_gather [2]")
    assert first_difference({0: usual, 1: odd, 2: usual}) == (
        [1],
        "began all_gather [2] where the others began all_reduce [8] as collective 2 of process "
        "group 0",
    )


def test_a_rank_that_has_yet_to_come_is_named_also_by_one_other():
    late = {0: begun("a [1]", "b [1]"), 1: begun("a [1]")}
    assert first_difference(late) == (
        [1],
        "did not begin b [1] as collective 2 of process group 0, where the others are",
    )


def test_of_two_histories_of_more_ranks_neither_is_said_to_be_wrong():
    both = {1: begun("a", "c"), 5: begun("a", "b", "c")}
    assert first_difference(both, is_complete=False) is None
    three = both | {6: begun("a", "b", "c")}
    found = first_difference(three, is_complete=False)
    assert found and found[0] == [1]


def test_ranks_that_do_the_same_differ_in_nothing_though_some_have_forgotten_more():
    assert first_difference({0: begun("a", "b", "c"), 1: begun("b", "c", first=2)}) is None
    assert first_difference({}) is None


def test_groups_are_compared_by_themselves():
    other = [Collective("7", 1, "all_gather [2]")]
    assert first_difference({0: begun("a") + other, 1: begun("a"), 2: begun("a")}) is None


def test_backends_of_a_group_count_for_themselves(monkeypatch):
    """As on GPUs: few collectives of gloo, and the newest of many of NCCL."""

    def entries(backend: str) -> list[dict]:
        numbers = {"gloo": range(1, 4), "nccl2": range(5000, 5003)}.get(backend, ())
        facts = {"is_p2p": False, "process_group": ["0", ""], "input_sizes": [[4]]}
        names = {"gloo": "gloo:broadcast", "nccl2": "nccl:all_reduce"}
        return [facts | {"collective_seq_id": n, "profiling_name": names[backend]} for n in numbers]

    monkeypatch.setattr(flight_recorder, "_entries", entries)
    whole = flight_recorder.history()
    assert first_difference({0: whole, 1: whole, 2: whole[:-1]}) == (
        [2],
        "did not begin all_reduce [4] as collective 5002 of process group 0 of nccl2, where the "
        "others are",
    )


def test_numbers_that_all_have_forgotten_are_no_difference():
    gap = begun("a") + begun("b", first=9)
    assert first_difference({0: gap, 1: gap}) is None


def leave_one_out(folder: Path) -> str:
    """What is said where the last rank leaves out an all-reduce."""
    for _ in range(3):
        dist.all_reduce(torch.zeros(4))
    if distributed.rank() < distributed.world_size() - 1:
        dist.all_reduce(torch.zeros(1), async_op=True)
    store = dist.FileStore(str(folder / "store"), distributed.world_size())
    flight_recorder.publish(store, distributed.rank())
    store.set(f"published-{distributed.rank()}", "")
    store.wait([f"published-{rank}" for rank in range(distributed.world_size())])
    return flight_recorder.compare_published(store, ["a", "a", "b"])


def test_a_planted_difference_of_real_ranks_is_named(tmp_path):
    for said in run_on_ranks(3, leave_one_out, tmp_path):
        assert said.startswith("; rank 2 on b did not begin all_reduce [1] as collective 4 of ")


def test_a_dump_lands_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    run_on_ranks(2, dump_into, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["flight-recorder-gloo-0", "flight-recorder-gloo-1"]
    entries = pickle.loads((tmp_path / names[1]).read_bytes())["entries"]
    assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce"]


def dump_into(folder: Path) -> None:
    flight_recorder.configure(folder)
    dist.all_reduce(torch.zeros(4))
    flight_recorder.dump(distributed.rank())
