"""A run that is stopped and started again is the run that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_recipe import small_recipe

from scale_smog import UserError, checkpoint, loop
from scale_smog.checkpoint import Checkpoints
from scale_smog.errors import RankError
from scale_smog.pretrain import pretrain
from scale_smog.reporting import run_folder
from scale_smog.reporting.progress import Progress
from scale_smog.reporting.starts import has_ended
from scale_smog.runtime import preemption

EVERY_STEP = ("run.checkpoint_every=1",)


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(checkpoint.list_checkpoints(run_dir)[-1])
    return {name: x.clone() for name, x in tensors.items()}  # they are a view of the file


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tars) -> Path:
    """The folder of a run of eight steps, with a checkpoint of each."""
    recipe = small_recipe(tmp_path_factory.mktemp("trained"), tars, *EVERY_STEP)
    pretrain(recipe)
    return Path(recipe.run.dir)


@pytest.fixture
def finished(tmp_path, trained) -> Path:
    """A copy of it, as `small_recipe(tmp_path, ...)` names it."""
    return shutil.copytree(trained, tmp_path / "run")


# tests/engine does the same with lars. Groups are reset after 3 and 6, an epoch ends in step 4.
@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", (1, 3, 4, 7)), ("sgd", (2, 5))])
def test_a_run_killed_after_any_step_ends_with_the_same_bits(tmp_path, tars, optimizer, steps):
    overrides = (*EVERY_STEP, f"optimizer.name={optimizer}", "data.num_small_crops=1")
    pretrain(small_recipe(tmp_path, tars, *overrides))
    whole = final_state(tmp_path / "run")
    assert whole["groups.centroids"].isfinite().all()
    for step in steps:
        again = tmp_path / f"after-{step}" / "run"
        shutil.copytree(tmp_path / "run", again)
        for folder in checkpoint.list_checkpoints(again)[step:]:
            shutil.rmtree(folder)
        pretrain(small_recipe(again.parent, tars, *overrides))
        assert_equal_bits(final_state(again), whole)
        lines = (again / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def after_each_step(monkeypatch, act: Callable[[int], None]) -> None:
    """Has `act` called with the number of finished steps."""
    real = Progress.after_step

    def after_step(self, step, *rest):
        real(self, step, *rest)
        act(step)

    monkeypatch.setattr(Progress, "after_step", after_step)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_ends_the_run_after_a_step_and_the_same_command_goes_on(
    tmp_path, tars, trained, monkeypatch, signals
):
    def signal_after_4(step):
        if step == 4:
            for number in signals:  # a terminal's Ctrl-C comes again from the launcher
                os.kill(os.getpid(), number)

    after_each_step(monkeypatch, signal_after_4)
    before = signal.getsignal(signals[0])
    recipe = small_recipe(tmp_path, tars)
    pretrain(recipe)
    assert [f.name for f in checkpoint.list_checkpoints(Path(recipe.run.dir))] == ["step-00000004"]
    assert signal.getsignal(signals[0]) == before
    monkeypatch.undo()
    pretrain(recipe)
    assert_equal_bits(final_state(tmp_path / "run"), final_state(trained))


def test_a_signal_in_the_last_step_leaves_the_end_to_the_next_start(tmp_path, tars, monkeypatch):
    def signal_after_8(step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    after_each_step(monkeypatch, signal_after_8)
    recipe = small_recipe(tmp_path, tars)
    pretrain(recipe)
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == "step-00000008"
    assert not (tmp_path / "run" / "results.json").exists()
    pretrain(recipe)
    assert (tmp_path / "run" / "results.json").exists()


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(tmp_path, tars, monkeypatch):
    monkeypatch.setattr(preemption, "SIGINT_GRACE_S", 0.0)

    def signal_twice(_step):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    after_each_step(monkeypatch, signal_twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small_recipe(tmp_path, tars))
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_a_finished_run_is_found_and_not_trained_again(
    tmp_path, tars, finished, monkeypatch, capsys
):
    recipe = small_recipe(tmp_path, tars)
    after_each_step(monkeypatch, lambda _step: pytest.fail("trained again"))
    capsys.readouterr()
    pretrain(recipe)
    assert "kNN top-1, trained net" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["one bit", "missing manifest"])  # others: tests/checkpoint
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path, tars, trained, finished, damage, capsys
):
    recipe = small_recipe(tmp_path, tars, *EVERY_STEP)
    whole, newest = final_state(trained), checkpoint.list_checkpoints(finished)[-1]
    if damage == "missing manifest":
        (newest / "manifest.json").unlink()
    else:
        target = next(newest.glob("shard-*.safetensors"))
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    assert checkpoint.find_damage(newest)
    capsys.readouterr()
    pretrain(recipe)
    said = capsys.readouterr().out
    assert "passed over" in said and "after step 7" in said
    assert_equal_bits(final_state(finished), whole)


@pytest.mark.parametrize("left", [".dataset.json.tmp", "dataset.json", ".recipe.yaml.tmp"])
def test_a_start_that_was_killed_does_not_lock_the_folder(tmp_path, left):
    recipe = small_recipe(tmp_path, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("{")
    with run_folder.claimed(recipe, "0" * 64) as changes:
        assert changes == []
    (tmp_path / "run" / "recipe.yaml").unlink()
    (tmp_path / "run" / "thesis.txt").touch()
    with (
        pytest.raises(UserError, match="is not a run's folder"),
        run_folder.claimed(recipe, "0" * 64),
    ):
        pass


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on node1 since today")
file.flush()
print("held", flush=True)
sys.stdin.read()  # until it is killed, or the test is
"""


def test_two_runs_never_share_a_folder_and_one_that_was_killed_leaves_it(
    tmp_path, tars, monkeypatch
):
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.5)
    (run_dir := tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDER, str(run_dir / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"held\n"
    recipe = small_recipe(tmp_path, tars)
    with pytest.raises(UserError, match="in use by process 7 on node1 since today"):
        pretrain(recipe)
    assert [x.name for x in run_dir.iterdir()] == [".lock"]
    other.kill()
    pretrain(recipe)
    assert checkpoint.list_checkpoints(run_dir)[-1].name == "step-00000008"
    other.communicate()


def test_all_settings_that_keep_a_run_from_going_on_are_named_at_once(tmp_path, tars, finished):
    changed = ("grouping.num_groups=9", "run.seed=4", "run.log_every=2")
    words = r"run\.seed=0, not 4; grouping\.num_groups=10, not 9: give another run\.dir, or"
    with pytest.raises(UserError, match=words + r" run\.seed=0 grouping\.num_groups=10$"):
        pretrain(small_recipe(tmp_path, tars, *EVERY_STEP, *changed))


def is_locked(run_dir: Path) -> bool:
    """Whether another process than this one would have to wait."""
    program = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    command = [sys.executable, "-c", program, str(run_dir / ".lock")]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0


def test_a_run_holds_its_folder_from_its_first_to_its_last_step(tmp_path, tars, monkeypatch):
    locked = {}
    run_dir = tmp_path / "run"
    after_each_step(monkeypatch, lambda step: locked.update({step: is_locked(run_dir)}))
    pretrain(small_recipe(tmp_path, tars, "run.steps=3"))
    assert locked == {1: True, 2: True, 3: True} and not is_locked(run_dir)


def test_only_the_newest_checkpoints_are_kept(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars, *EVERY_STEP, "run.keep_checkpoints=2")
    pretrain(recipe)
    names = [f.name for f in checkpoint.list_checkpoints(Path(recipe.run.dir))]
    assert names == ["step-00000007", "step-00000008"]


def test_a_torn_last_metrics_line_is_cut(tmp_path, tars, finished):
    for folder in checkpoint.list_checkpoints(finished)[5:]:
        shutil.rmtree(folder)
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 9, "lo')
    pretrain(small_recipe(tmp_path, tars, *EVERY_STEP))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("grouping.num_groups=9", "grouping.num_groups=10"),
        ("run.steps=7", "run.steps=8"),
        ("run.seed=1", "run.seed=0"),
        ("data.global_batch=8", "data.global_batch=12"),
    ],
)
def test_another_recipe_in_the_run_folder_is_refused_by_key(
    tmp_path, tars, finished, override, key
):
    with pytest.raises(UserError, match=key):
        pretrain(small_recipe(tmp_path, tars, override))


def test_allowed_changes_are_logged_and_the_run_grows(tmp_path, tars, finished, capsys):
    run_folder.add_results(finished, {"linear": {"top1": 0.5}})  # of step 8
    pretrain(small_recipe(tmp_path, tars, "run.steps=10", "run.log_every=5"))
    assert run_folder.read_results(finished).keys() == {"run", "groups", "knn"}
    assert has_ended(finished)
    out = capsys.readouterr().out
    assert "run.steps: 8 -> 10" in out and "run.log_every: 1 -> 5" in out
    assert checkpoint.list_checkpoints(finished)[-1].name == "step-00000010"


def test_a_machine_with_less_disk_or_memory_can_go_on_with_the_run(tmp_path, tars):
    with run_folder.claimed(small_recipe(tmp_path, tars), "hash"):
        pass
    keys = ("data.cache_gib=1", "data.cache_dir=x", "evaluation.batch=8", "run.evaluate_every=4")
    with run_folder.claimed(small_recipe(tmp_path, tars, *keys), "hash") as changes:
        assert [line.partition(":")[0] for line in sorted(changes)] == [
            key.partition("=")[0] for key in sorted(keys)
        ]


def test_another_dataset_or_a_foreign_folder_is_refused(tmp_path, tars, finished):
    other = shutil.copytree(tars, tmp_path / "other")
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace("class0", "class9"))
    with pytest.raises(UserError, match="another dataset"):
        pretrain(small_recipe(tmp_path, other))
    foreign = tmp_path / "foreign" / "run"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="not a run's folder"):
        pretrain(small_recipe(tmp_path / "foreign", tars))
    assert [f.name for f in foreign.iterdir()] == ["thesis.txt"]


def test_a_run_outlives_a_disk_that_fills_and_goes_on_when_there_is_room(
    small_disk, tars, trained, capsys
):
    recipe = small_recipe(small_disk, tars, *EVERY_STEP)
    with pytest.raises(UserError, match=r"No space left on device.*step-0000000\d is there"):
        pretrain(recipe)
    assert "training goes on" in capsys.readouterr().out
    left = checkpoint.list_checkpoints(small_disk / "run")
    assert left and all(checkpoint.find_damage(folder) is None for folder in left)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    pretrain(recipe)
    assert_equal_bits(final_state(small_disk / "run"), final_state(trained))


def test_a_checkpoint_on_its_way_arrives_though_the_run_ends_by_an_error(
    tmp_path, tars, monkeypatch
):
    write, step = Checkpoints._write, loop.train_step

    def write_slowly(self, number, partitions):
        time.sleep(0.5)
        write(self, number, partitions)

    def step_or_fail(state, batch, now):
        if state.step == 3:
            raise UserError("no step is finite")
        return step(state, batch, now)

    monkeypatch.setattr(Checkpoints, "_write", write_slowly)
    monkeypatch.setattr(loop, "train_step", step_or_fail)
    with pytest.raises(UserError, match="no step is finite"):
        pretrain(small_recipe(tmp_path, tars, "run.checkpoint_every=2"))
    assert [folder.name[-1] for folder in checkpoint.list_checkpoints(tmp_path / "run")] == ["2"]


def test_data_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(tmp_path, tars):
    data = shutil.copytree(tars, tmp_path / "data")
    recipe = small_recipe(tmp_path, data, "run.checkpoint_every=2")
    real_step, tar = loop.train_step, next(data.glob("train-*.tar"))
    content = tar.read_bytes()

    def lose_the_data(state, batch, now):
        if state.step == 3:
            os.truncate(tar, 0)
        return real_step(state, batch, now)

    with mock.patch.object(loop, "train_step", lose_the_data):
        with pytest.raises(RankError, match=r"rank 0 on .* goes on from the newest checkpoint"):
            pretrain(recipe)
    saved = [folder.name[-1] for folder in checkpoint.list_checkpoints(tmp_path / "run")]
    assert saved[0] == "2" and "6" not in saved  # batches read ahead are trained on first
    tar.write_bytes(content)
    pretrain(recipe)
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == "step-00000008"
