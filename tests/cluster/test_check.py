"""`check.py RECIPE` over two hosts."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hosts import Cluster, console, finish
from inject_fault import FAKETIME, FAULTS, injected
from programs import CHECK, OVERRIDES, RECIPE
from ranks import run_on_ranks
from small_recipe import small_recipe

from scale_smog import distributed
from scale_smog.preflight import checks, dataset, versions
from scale_smog.preflight.dataset import DatasetView
from scale_smog.preflight.network import Link, find_slow_links, ring_rounds
from scale_smog.preflight.table import Row, format_table, most_agreed
from scale_smog.profiling.hardware import load_hardware


def test_faults_of_one_host_are_all_named(cluster: Cluster, demo: Path, tmp_path: Path):
    names = ["another package version", "missing shard", "changed shard", "read-only run folder"]
    names += ["slow link", *(["wrong clock"] if FAKETIME else [])]
    run = tmp_path / "run"
    run.mkdir()
    with injected(cluster.hosts[1], names, demo, run):
        program = [CHECK, RECIPE, *OVERRIDES, f"data.path={demo}", f"run.dir={run}"]
        status = finish(cluster.torchrun(tmp_path, *program), tmp_path)
    said = console(tmp_path).read_text()
    assert status != 0
    assert [name for name in names if not re.search(FAULTS[name].pattern, said)] == [], said
    assert not list(run.iterdir())


def test_the_odd_host_is_named_and_the_first_is_right_in_a_draw():
    hosts = ["a", "b", "c"]
    row = versions.compare(hosts, [{"torch": "1"}, {"torch": "2"}, {"torch": "2"}])
    assert row.faults == ["a has torch 1, b has 2"]
    assert versions.compare(["a", "b"], [{"x": "1"}, {}]).faults == ["b has x none, a has 1"]
    assert most_agreed([1.0, 9.0, 9.5], 0.9) == 9.0
    assert most_agreed([1.0, 9.0], 0.9) == 1.0
    views = [DatasetView("m", 2, ()), DatasetView("other", 2, ("train-000000.tar is missing",))]
    faults = dataset.compare(["a", "b"], views, "set", thorough=True).faults
    assert len(faults) == 2 and all(fault.startswith("b") for fault in faults)
    odd = [DatasetView(sha256, 2, ()) for sha256 in ("old", "new", "new")]
    assert dataset.compare(hosts, odd, "set", thorough=True).faults == [
        "a has another dataset in set: copy it from b"
    ]


def test_a_dataset_is_read_to_the_last_byte_only_where_that_is_asked_for(tmp_path, tars):
    for path in tars.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert dataset.inspect(str(tmp_path), thorough=True).problems == ()
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert dataset.inspect(str(tmp_path), thorough=False).problems == ()
    assert dataset.inspect(str(tmp_path), thorough=True).problems == (
        "train-000001.tar is changed",
    )
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "bytes" in dataset.inspect(str(tmp_path), thorough=False).problems[0]


def test_a_small_sets_own_groups_are_what_is_checked(tmp_path, tars):
    given = ("run.small_data=true", "grouping.num_groups=2", "data.global_batch=8")
    recipe = checks.as_trained(small_recipe(tmp_path, tars, *given))
    assert recipe.grouping.bank_steps == 1  # 2.5 features a group
    nowhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "nowhere"})})
    assert checks.as_trained(nowhere) == nowhere


def settings_of(folder: Path, data: Path) -> list[str]:
    rate = 0.1 * (1 + distributed.rank() // 2)
    own = (f"optimizer.base_lr={rate}", f"run.dir={folder / str(distributed.rank())}")
    return checks.check_recipes(small_recipe(folder / str(rate), data, *own)).faults


def test_a_rank_with_other_settings_is_named(tmp_path, tars):
    for faults in run_on_ranks(3, settings_of, tmp_path, tars):
        (fault,) = faults
        assert re.search(r"^rank 2 on .* has optimizer.base_lr 0.2, rank 0 on .* has 0.1$", fault)


def patience_for_readers(folder: Path, data: Path) -> list[float]:
    """Seconds that ranks wait in each exchange that follows a look at the dataset."""
    looks, gather = [], distributed.gather_objects

    def recorded(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        if group is not None:
            backend: Any = group._get_backend(torch.device("cpu"))
            looks.append(backend.options._timeout.total_seconds())
        return gather(value, group)

    distributed.gather_objects = recorded
    distributed.process_group = lambda _: nullcontext(torch.device("cpu"))  # there is one
    checks.check(small_recipe(folder, data))
    return looks


def test_a_host_may_read_its_dataset_for_hours(tmp_path, tars):
    for looks in run_on_ranks(2, patience_for_readers, tmp_path, tars):
        assert looks == [checks.READING_TIMEOUT.total_seconds()] * 2


def test_a_slow_link_is_one_the_network_or_most_links_beat():
    fast, slow = Link("a", "b", 1e-5, 40e9), Link("b", "c", 4e-4, 40e9)
    assert find_slow_links([fast], load_hardware("h200")).faults == []
    assert "b - c" in find_slow_links([fast, slow], load_hardware("h200")).faults[0]
    assert (
        find_slow_links([fast, slow], None).faults == []
    )  # a fifth of what any wired network does
    assert "b - c" in find_slow_links([fast, slow, fast], None).faults[0]
    assert "0.01 GB/s" in find_slow_links([Link("a", "b", 1e-5, 1e7)], None).faults[0]


def test_no_host_sends_to_two_at_a_time():
    for num in range(2, 9):
        rounds = ring_rounds(num)
        for pairs in rounds:
            ends = [end for pair in pairs.values() for end in pair]
            assert len(ends) == len(set(ends))
        assert sum(map(len, rounds)) == (num if num > 2 else 1)


def test_ranks_that_are_no_whole_nodes_are_named():
    even = checks.Hosts(["a", "b"], [0, 2], [2, 2], are_in_order=True)
    assert checks.check_nodes(even, True).faults == []
    uneven = even._replace(num_ranks=[2, 1, 2], names=["a", "b", "c"])
    (fault,) = checks.check_nodes(uneven, False).faults
    assert fault.startswith("b has 1 ranks, the others 2")
    mixed = even._replace(are_in_order=False)
    (fault,) = checks.check_nodes(mixed, True).faults
    assert "srun --distribution=block" in fault
    assert checks.check_nodes(mixed, False).faults == []


def test_every_fault_has_its_line():
    lines = format_table([Row("a", "fine"), Row("b", "", ["one", "two"])]).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "ok", "fine"],
        ["b", "FAULT", "one"],
        ["FAULT", "two"],
    ]
