"""A checkpoint is loaded whole or not at all, by any number of ranks."""

import errno
import hashlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks
from small_recipe import small_recipe
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from scale_smog import UserError, checkpoint, distributed
from scale_smog.checkpoint import Checkpoints, saving
from scale_smog.checkpoint import disk_space as space
from scale_smog.checkpoint.manifest import MANIFEST_FILE
from scale_smog.config import RunConfig
from scale_smog.data import TarDataset
from scale_smog.data.augment import training_views
from scale_smog.data.loaders.build import build_plan, build_training_loader
from scale_smog.distributed import Partition
from scale_smog.runtime import retries

ROOT = Path(__file__).parent.parent.parent
SIZES = (1, 3)  # numbers of ranks; three write unequal parts


def pieces_of(value: float, numel: int = 1000) -> dict[str, Partition]:
    """A small state: two tensors that all ranks hold, and one of which each has rows."""
    rows = torch.full((8 // distributed.world_size(), 3), value)
    return {
        "online.w": Partition.replicated(torch.full((numel,), value)),
        "online.n": Partition.replicated(torch.tensor(int(value))),
        "bank.ring": Partition.from_rows(rows),
    }


def save_steps(run: RunConfig, *steps: int) -> None:
    checkpoints = Checkpoints(run, {"dataset": "x"})
    for step in steps:
        assert checkpoints.save(step, pieces_of(float(step))) is None
        assert checkpoints.wait() is None


def newest(run: RunConfig) -> int | None:
    """The step that comes back, whose tensors must be that step's."""
    restored = Checkpoints(run, {}).load_newest(pieces_of(0.0))
    if restored is None:
        return None
    for name, value in restored.values.items():
        assert (value == restored.step).all(), name
    return restored.step


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint.list_checkpoints(run_dir)]


@pytest.fixture
def run(tmp_path) -> RunConfig:
    return RunConfig(dir=str(tmp_path / "run"), steps=1)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_ranks_files(tmp_path_factory) -> Path:
    """Steps 1 and 2 as two ranks save them."""
    folder = tmp_path_factory.mktemp("two") / "run"
    run_on_ranks(2, save_steps, RunConfig(dir=str(folder), steps=1), 1, 2)
    return folder


def test_every_damage_to_every_file_is_found_and_the_older_checkpoint_taken(
    two_ranks_files, tmp_path
):
    run = RunConfig(dir=str(tmp_path / "run"), steps=1)
    shutil.copytree(two_ranks_files, run.dir)
    folder = checkpoint.list_checkpoints(Path(run.dir))[-1]
    files = sorted(folder.iterdir())
    assert len(files) == 3  # one a rank, and the manifest
    assert newest(run) == 2
    rng, num_damages = random.Random(0), 0
    for path in files:
        content = path.read_bytes()
        bits = rng.sample(range(8 * len(content)), 60)
        damages = [content[: len(content) * part // 4] for part in range(4)]
        for damage in [None, *damages, *bits]:
            if damage is None:
                path.unlink()
            elif isinstance(damage, bytes):
                path.write_bytes(damage)
            else:
                flip(path, damage)
            assert checkpoint.find_damage(folder), (path, damage)
            num_damages += 1
            if not isinstance(damage, int) or num_damages % 10 == 0:
                assert newest(run) == 1
            path.write_bytes(content)
    assert newest(run) == 2 and num_damages == 195


def test_a_file_system_that_fails_over_does_not_make_a_checkpoint_damaged(run, monkeypatch):
    save_steps(run, 1, 2)
    monkeypatch.setattr(retries, "RETRY_DELAYS_S", (0, 0))
    real_digest, failures = hashlib.file_digest, iter([1, 1])

    def file_digest(file, name):
        if next(failures, 0):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    assert newest(run) == 2


def test_an_old_checkpoint_that_cannot_go_is_no_failed_save(run, monkeypatch):
    def remove(*_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(saving, "remove_superseded", remove)
    save_steps(run, 1, 2)
    assert newest(run) == 2


def prepare_alike(run: RunConfig) -> str | None:
    """Every rank holds the same range of a tensor, as hsdp's nodes do."""
    partition = Partition(torch.zeros(1000), 0, torch.Size([1000]), is_replicated=False)
    usage = namedtuple("usage", "free")(6000 * distributed.world_size())
    with mock.patch.object(space.shutil, "disk_usage", lambda _: usage):
        return Checkpoints(run, {}).prepare({"online.w": partition})


def test_what_several_nodes_hold_needs_room_once(run):
    one = run.model_copy(update={"keep_checkpoints": 1})
    assert run_on_ranks(2, prepare_alike, one) == [None, None]


def test_a_file_that_does_not_belong_is_found(run):
    save_steps(run, 1, 2)
    folder = checkpoint.list_checkpoints(Path(run.dir))[-1]
    shard = next(folder.glob("*.safetensors"))
    shutil.copy(shard, folder / "shard-00009-model-00001-of-00001.safetensors")
    assert "does not belong" in (checkpoint.find_damage(folder) or "")
    assert newest(run) == 1


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run):
    save_steps(run, 1, 2)
    for folder in checkpoint.list_checkpoints(Path(run.dir)):
        flip(folder / MANIFEST_FILE, 800)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .* --doctor"):
        newest(run)


def test_a_checkpoint_of_a_later_version_is_refused_and_not_passed_over(run, monkeypatch):
    save_steps(run, 1)
    monkeypatch.setattr(saving, "FORMAT_VERSION", 3)
    save_steps(run, 2)
    with pytest.raises(UserError, match="has format 3"):
        newest(run)


def test_a_checkpoint_under_another_step_s_name_is_refused(run):
    save_steps(run, 1)
    only = checkpoint.list_checkpoints(Path(run.dir))[0]
    os.rename(only, only.with_name("step-00000009"))
    with pytest.raises(UserError, match="holds step 1"):
        newest(run)


# Killed at each point at which something is written.


def save_and_die(run: RunConfig, point: int) -> None:
    """Saves step 2 and is killed at the n-th time that it writes, renames or removes."""
    num_left = point
    root = str(Path(run.dir) / "checkpoints")

    def reached(*_: object) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        opens = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if (writes or opens) and str(arguments[0]).startswith(root):
            reached()

    real_sync = os.fsync
    os.fsync = lambda descriptor: (reached(), real_sync(descriptor))  # pyright: ignore
    sys.addaudithook(audit)
    save_steps(run, 2)
    os._exit(0)


def test_a_save_killed_at_any_write_leaves_a_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    steps: list[int | None] = []
    while True:
        run = RunConfig(dir=str(tmp_path / f"{len(steps)}"), steps=1, keep_checkpoints=1)
        save_steps(run, 1)
        process = context.Process(target=save_and_die, args=(run, len(steps) + 1))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        steps.append(newest(run))
        save_steps(run, 3)  # and what the killed one left behind is in nobody's way
        assert newest(run) == 3
    assert len(steps) >= 12 and set(steps) == {1, 2}
    assert steps == sorted(steps)  # the rename is the one point at which it changes
    assert names(Path(run.dir)) == ["step-00000002"]


# Any number of ranks.


def save_and_load(folder: Path) -> dict[str, torch.Tensor]:
    """Saves a trained state; what then comes back under this number of ranks is saved again."""
    size = distributed.world_size()
    recipe = runs.recipe_of(folder / f"{size}", optimizer="adamw")
    runs.run(recipe, runs.build_state(recipe), 5)
    return {}


def load_all(folder: Path) -> None:
    for saved in SIZES:
        state = runs.build_state(runs.recipe_of(folder / "unused", optimizer="adamw"))
        restored = Checkpoints(RunConfig(dir=str(folder / f"{saved}"), steps=1), {}).load_newest(
            state.state_dict()
        )
        assert restored
        state.load_state_dict(restored.values, restored.step)
        to = f"{saved} to {distributed.world_size()}"
        again = Checkpoints(RunConfig(dir=str(folder / to), steps=1), {})
        assert again.save(state.step, state.state_dict()) is None and again.wait() is None


def load_all_and_go_on(folder: Path, data: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    load_all(folder)
    return next_batches(data, 5, 20)


def next_batches(data: Path, first: int, num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sample numbers and pixels of this rank's next batches."""
    own = data.parent / f"recipe-{distributed.rank()}-{distributed.world_size()}"
    recipe = small_recipe(own, data, "data.global_batch=12")
    dataset = TarDataset(recipe.data.path, "train")
    plan = build_plan(recipe.data, dataset, recipe.run.seed)
    views = training_views(recipe.data, recipe.augment)
    steps, device = range(first, first + num), torch.device("cpu")
    loader = build_training_loader(recipe.data, views, dataset, plan, steps, device)
    return [(batch.sample_id, batch.large[0]) for batch in loader]


def test_saved_and_resumed_at_any_number_of_ranks_the_state_and_the_batches_are_equal(
    tmp_path, tars
):
    batches = {}
    for size in SIZES:
        run_on_ranks(size, save_and_load, tmp_path)
    for size in SIZES:
        by_rank = run_on_ranks(size, load_all_and_go_on, tmp_path, tars)
        batches[size] = [
            [torch.cat(parts) for parts in zip(*step, strict=True)]
            for step in zip(*by_rank, strict=True)
        ]
    for saved in SIZES:
        expected = runs.final_state(tmp_path / f"{saved}")
        for size in SIZES:
            got = runs.final_state(tmp_path / f"{saved} to {size}")
            assert expected.keys() == got.keys() and len(got) > 40
            assert not [name for name in got if not torch.equal(got[name], expected[name])]
    for size in SIZES:
        assert len(batches[size]) == 20
        for (ids, pixels), (own_ids, own_pixels) in zip(batches[1], batches[size], strict=True):
            assert torch.equal(ids, own_ids) and torch.equal(pixels, own_pixels)


def test_the_work_of_writing_is_spread_over_the_ranks(two_ranks_files):
    sizes = [path.stat().st_size for path in two_ranks_files.glob("*/step-*2/shard*")]
    assert len(sizes) == 2 and sum(sizes) < 2 * 5000  # nothing twice


def share_of_equal_ranges(folder: Path, max_writers: int) -> tuple[set[str], int | None]:
    """What this rank writes of ranges that all ranks hold, as hsdp's nodes do."""
    saving.MAX_WRITERS = max_writers
    run = RunConfig(dir=str(folder), steps=1)
    whole = Partition(torch.full((100,), 3.0), 0, torch.Size([100]), is_replicated=False)
    partitions = {f"online.{number}": whole for number in range(20)} | pieces_of(3.0)
    checkpoints = Checkpoints(run, {})
    for _ in range(2):  # the second changes nothing
        assert checkpoints.prepare(partitions) is None
    assert checkpoints.save(3, partitions) is checkpoints.wait() is None
    own = {name for name in checkpoints._own(partitions) if name != "bank.ring"}
    restored = checkpoints.load_newest(partitions)
    assert restored and all((value == 3).all() for value in restored.values.values())
    return own, newest(run)


@pytest.mark.parametrize("max_writers", [8, 2])
def test_a_few_ranks_share_the_writing_of_what_several_hold(tmp_path, max_writers):
    outcomes = run_on_ranks(3, share_of_equal_ranges, tmp_path, max_writers)
    shares = [own for own, step in outcomes if step == 3]
    assert len(shares) == 3
    for kind in ("0123456789", "wn"):  # held by several, and by all
        assert sum(any(x[-1] in kind for x in own) for own in shares) <= max_writers
    assert sum(len(own) >= 5 for own in shares) == min(3, max_writers)
    assert sum(map(len, shares)) == len(set.union(*shares)) == 22


def save_wrong_ranges(folder: Path) -> list[tuple[str, list[str]]]:
    """What is said, and which checkpoints are there, where the ranks' ranges do not fit."""
    number, outcomes = distributed.rank(), []
    for start in (6 * number, 4 * number, number, 5 * number + 1):  # of 5 values each, of 10
        whole = Partition(torch.ones(3), 0, torch.Size([3]), is_replicated=True)
        part = Partition(torch.ones(5), start, torch.Size([10]), is_replicated=False)
        checkpoints = Checkpoints(RunConfig(dir=str(folder), steps=1), {})
        checkpoints.save(1, {"online.w": whole, "bank.ring": part})
        with pytest.raises(RuntimeError) as raised:
            checkpoints.wait()
        outcomes.append((str(raised.value), names(folder)))
    return outcomes


def test_ranges_with_a_gap_or_an_overlap_are_no_checkpoint(tmp_path):
    for outcomes in run_on_ranks(2, save_wrong_ranges, tmp_path):
        said = "the ranks' ranges are not the whole of bank.ring, each element once"
        assert outcomes[:3] == [(said, [])] * 3
        assert outcomes[3] == (said.replace("bank.ring", "a tensor without a beginning"), [])


def fail_on_rank_1(folder: Path) -> str:
    """What this rank hears when rank 1 cannot write, for a reason that is not the disk's."""
    checkpoints = Checkpoints(RunConfig(dir=str(folder), steps=1), {})
    find = (
        saving.SavePlanner.lookup_object
        if distributed.is_main()
        else mock.Mock(side_effect=KeyError)
    )
    with mock.patch.object(saving.SavePlanner, "lookup_object", find):
        checkpoints.save(1, pieces_of(1.0))
        with pytest.raises(RuntimeError) as raised:
            checkpoints.wait()
    return str(raised.value)


def test_all_ranks_hear_why_one_could_not_write(tmp_path):
    assert run_on_ranks(2, fail_on_rank_1, tmp_path) == ["rank 1: KeyError()"] * 2


def num_header_reads(folder: Path) -> int:
    """How often loading makes this rank read the headers of all files."""
    run = RunConfig(dir=str(folder), steps=1)
    save_steps(run, 1)
    read = HuggingFaceStorageReader.read_metadata
    patch = mock.patch.object(
        HuggingFaceStorageReader, "read_metadata", autospec=True, side_effect=read
    )
    with patch as reads:
        assert newest(run) == 1
    return reads.call_count


def test_the_headers_of_all_ranks_files_are_read_by_rank_0_alone(tmp_path):
    assert run_on_ranks(2, num_header_reads, tmp_path) == [1, 0]


def disagree(folder: Path) -> tuple[str, int | None]:
    """What rank 1 writes is not seen by rank 0; each gave another folder, and rank 0's counts."""
    run = RunConfig(dir=str(folder / f"of-rank-{distributed.rank()}"), steps=1)
    save_steps(run, 1)
    write = space._write if distributed.is_main() else lambda path: None
    with mock.patch.object(space, "_write", write):
        try:
            Checkpoints(run, {}).prepare(pieces_of(1.0))
        except UserError as error:
            return str(error), newest(run)
    return "", None


def test_hosts_that_do_not_share_the_run_folder_are_told_before_the_first_step(tmp_path):
    for error, step in run_on_ranks(2, disagree, tmp_path):
        assert "all hosts must share the folder" in error and step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["of-rank-0"]


# Retention, background, space.


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    settings = {"keep_checkpoints": 2, "keep_checkpoint_every": 4}
    run = RunConfig(dir=str(tmp_path / "run"), steps=1, **settings)
    save_steps(run, *range(1, 8))
    assert [name[-1] for name in names(Path(run.dir))] == ["4", "6", "7"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    run = RunConfig(dir=str(tmp_path / "run"), steps=1, keep_checkpoints=1)
    save_steps(run, 1)
    damaged = shutil.copytree(*(Path(run.dir) / "checkpoints" / f"step-0000000{i}" for i in (1, 2)))
    assert checkpoint.find_damage(damaged)
    save_steps(run, 3)
    assert [name[-1] for name in names(Path(run.dir))] == ["2", "3"]


def test_what_changes_after_a_save_began_is_not_in_it(run):
    checkpoints, partitions = Checkpoints(run, {}), pieces_of(1.0, numel=2_000_000)
    checkpoints.save(1, partitions)
    partitions["online.w"].values.fill_(9.0)
    assert checkpoints.wait() is None
    assert newest_w(run, partitions) == 1.0
    checkpoints.save(2, partitions)  # through the same memory
    partitions["online.w"].values.fill_(3.0)
    assert checkpoints.wait() is None and newest_w(run, partitions) == 9.0


def newest_w(run: RunConfig, partitions: dict[str, Partition]) -> float:
    restored = Checkpoints(run, {}).load_newest(partitions)
    assert restored
    (value,) = restored.values["online.w"].unique().tolist()
    return value


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(small_disk):
    run = RunConfig(dir=str(small_disk / "run"), steps=1)
    checkpoints, partitions = Checkpoints(run, {}), pieces_of(1.0, numel=2_000_000)  # 8 MB
    assert "room for 1 checkpoints" in (checkpoints.prepare(partitions) or "")
    checkpoints.save(1, partitions)
    assert checkpoints.wait() is None
    checkpoints.save(2, partitions)
    problem = checkpoints.wait() or ""
    assert "No space left on device" in problem and "step-00000001 is there" in problem
    assert newest_w(run, partitions) == 1.0
    assert names(Path(run.dir)) == ["step-00000001"]
    assert len(list((small_disk / "run" / "checkpoints").iterdir())) == 1  # its space is free again
    shutil.rmtree(small_disk / "run" / "checkpoints" / "step-00000001")
    checkpoints.save(3, partitions)
    assert checkpoints.wait() is None and names(Path(run.dir)) == ["step-00000003"]


def test_a_disk_that_cannot_hold_one_checkpoint_or_nothing_is_refused_at_once(small_disk):
    run = RunConfig(dir=str(small_disk / "run"), steps=1)
    with pytest.raises(UserError, match="MiB free and one checkpoint needs 38"):
        Checkpoints(run, {}).prepare(pieces_of(1.0, numel=10_000_000))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        Checkpoints(run, {}).prepare(pieces_of(1.0))


def ask_the_doctor(folder: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """Runs launcher/check.py in this process; its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["check.py", "--doctor", folder])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launcher" / "check.py"), run_name="__main__")
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_the_doctor_names_what_is_whole_and_why_the_others_are_not(run, monkeypatch, capsys):
    save_steps(run, 1, 2)
    flip(next((Path(run.dir) / "checkpoints" / "step-00000002").glob("shard*")), 4321)
    capsys.readouterr()
    status, said, _ = ask_the_doctor(run.dir, monkeypatch, capsys)
    second, first, verdict = said.splitlines()
    assert status == 1
    assert second.startswith("step-00000002  NOT WHOLE") and "has changed" in second
    assert first == "step-00000001  whole" and verdict == "the run goes on from step-00000001"
    status, _, error = ask_the_doctor("nowhere", monkeypatch, capsys)
    assert status == 2 and error.startswith("error: no checkpoint in nowhere")


def test_a_failed_save_is_said_though_the_folder_cannot_be_listed(tmp_path, monkeypatch):
    def stale(_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    checkpoints = Checkpoints(RunConfig(dir=str(tmp_path), steps=1), {})
    checkpoints._problem = OSError("the disk is gone")
    monkeypatch.setattr(saving, "list_checkpoints", stale)
    assert "no checkpoint written: the disk is gone" in (checkpoints.wait() or "")
