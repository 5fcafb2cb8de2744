"""Checkpoints in a store: whole ones come back, and a store that fails stops nothing."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from s3_store import BUCKET

from scale_smog import UserError
from scale_smog.checkpoint import Checkpoints, list_checkpoints, mirror
from scale_smog.checkpoint.mirror import Mirror, bring_back
from scale_smog.config import RunConfig
from scale_smog.distributed import Partition
from scale_smog.pretrain import MIRROR_LOOK_S, await_mirror
from scale_smog.runtime import phases, stores
from scale_smog.runtime.stores import Store


@pytest.fixture
def run(tmp_path, s3) -> RunConfig:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    return RunConfig(dir=str(tmp_path / "run"), steps=1, mirror=url, keep_checkpoints=2)


@pytest.fixture
def impatient(monkeypatch):
    """Nothing is tried for long."""
    monkeypatch.setattr(stores, "PATIENCE_S", 0.0)


def state_of(value: float) -> dict[str, Partition]:
    return {"online.w": Partition.replicated(torch.full((1000,), value))}


def save(run: RunConfig, *steps: int) -> str | None:
    checkpoints = Checkpoints(run, {})
    for step in steps:
        assert checkpoints.save(step, state_of(float(step))) is None
        assert checkpoints.wait() is None
        problem = checkpoints.wait_for_mirror(60)
    return problem


def unmirrored(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"mirror": ""})


def name_run(run: RunConfig, name: str) -> None:
    Path(run.dir).mkdir()
    (Path(run.dir) / "dataset.json").write_text(json.dumps({"run": name}))


def lose_machine(run: RunConfig) -> None:
    shutil.rmtree(run.dir, ignore_errors=True)


def newest(run: RunConfig) -> int | None:
    """The step that comes back, whose tensors must be that step's."""
    bring_back(run)
    restored = Checkpoints(unmirrored(run), {}).load_newest(state_of(0.0))
    if restored is None:
        return None
    assert (restored.values["online.w"] == restored.step).all()
    return restored.step


class Said:
    """Metrics that keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.say = self.lines.append


def copies(run: RunConfig) -> set[str]:
    return {name.partition("/")[0] for name in Store(run.mirror).sizes("*/manifest.json")}


def test_a_lost_machine_goes_on_from_the_newest_copy(run):
    assert save(run, 10, 20, 30) is None
    assert copies(run) == {"step-00000020", "step-00000030"}  # as run.dir keeps them
    lose_machine(run)
    assert newest(run) == 30
    assert [f.name for f in list_checkpoints(Path(run.dir))] == ["step-00000030"]


def test_without_any_copy_a_run_begins_anew(run):
    assert newest(run) is None


def test_checkpoints_of_the_run_folder_come_before_copies(run):
    save(run, 10)
    save(unmirrored(run), 20)
    assert newest(run) == 20


def what_is_said_of_a_copy(checkpoints: Checkpoints, capfd) -> str:
    """Stderr up to the line on a copy that has failed, which is tried again."""
    said, end = "", time.monotonic() + 60
    while "warning: no copy of step-00000010" not in said:
        assert time.monotonic() < end and checkpoints.wait_for_mirror(0.1)
        said += capfd.readouterr().err
    return said


def copy_until(num_requests: int, run: RunConfig, s3) -> bool:
    """Copies the checkpoint until so many requests were answered; whether these were all."""
    before = sum(s3.requests.values())
    s3.fault = lambda _: "reset" if sum(s3.requests.values()) - before > num_requests else None
    copier = Mirror(run)
    with suppress(OSError):
        copier._copy(list_checkpoints(Path(run.dir))[-1])
        copier._tidy(20)
    s3.fault = lambda _: None
    return sum(s3.requests.values()) - before <= num_requests


@pytest.mark.parametrize(("step", "value"), [(10, 10.0), (20, -1.0)])
def test_a_copy_that_ends_anywhere_leaves_only_copies_that_load_right(
    run, s3, impatient, step, value
):
    run = run.model_copy(update={"keep_checkpoints": 1})
    older = Checkpoints(elsewhere := run.model_copy(update={"dir": run.dir + "-elsewhere"}), {})
    assert older.save(step, state_of(value)) is None
    assert older.wait() is None and older.wait_for_mirror(60) is None
    store = Store(run.mirror)
    before = {name: store.read(name) for name in store.sizes()}
    save(unmirrored(run), 20)
    found, is_whole = [], False
    while not is_whole:
        is_whole = copy_until(len(found), run, s3)
        lose_machine(elsewhere)
        bring_back(elsewhere)
        restored = Checkpoints(unmirrored(elsewhere), {}).load_newest(state_of(0.0))
        found.append(restored and (restored.step, *set(restored.values["online.w"].tolist())))
        if not is_whole:
            for name in store.sizes():
                store.remove(name)
            for name, content in before.items():
                store.write(name, content)
    assert found[0] == (step, value) and found[-1] == (20, 20.0)
    assert len(found) > 4 and set(found) <= {(step, value), None, (20, 20.0)}
    assert None not in found or step == 20  # the copy of that step is removed before it is replaced
    assert {name.partition("/")[0] for name in store.sizes()} == {"step-00000020"}


def test_a_damaged_copy_is_passed_over(run):
    save(run, 10, 20)
    store = Store(run.mirror)
    (name,) = store.sizes("step-00000020/*.safetensors")
    content = bytearray(store.read(name))
    content[-1] ^= 1
    store.write(name, bytes(content))
    lose_machine(run)
    assert newest(run) == 10


def test_a_store_that_fails_stops_no_training_and_the_next_copy_succeeds(run, s3, impatient, capfd):
    s3.fault = lambda handler: "slow down" if handler.command == "PUT" else None
    checkpoints = Checkpoints(run, {})
    assert checkpoints.save(10, state_of(10.0)) is None
    assert checkpoints.wait() is None
    said = what_is_said_of_a_copy(checkpoints, capfd)
    assert "SlowDown" in said or "reduce your request rate" in said
    s3.fault = lambda *_: None
    assert checkpoints.save(20, state_of(20.0)) is None
    assert checkpoints.wait() is None and checkpoints.wait_for_mirror(60) is None
    assert copies(run) == {"step-00000020"}


def test_the_last_copy_is_made_when_the_store_is_back_or_by_the_next_start(
    run, s3, impatient, monkeypatch
):
    monkeypatch.setattr(mirror, "RETRY_S", 0.2)
    s3.fault = lambda handler: "slow down" if handler.command == "PUT" else None
    checkpoints = Checkpoints(run, {})
    checkpoints.save(10, state_of(10.0))
    checkpoints.wait()
    with pytest.raises(UserError, match=r"step-00000010 is not in .*the same command copies it"):
        await_mirror(checkpoints, Said(), MIRROR_LOOK_S)
    s3.fault = lambda *_: None
    assert checkpoints.wait_for_mirror(60) is None and copies(run) == {"step-00000010"}
    save(unmirrored(run), 20)  # a run that ended before its copy was there
    again = Checkpoints(run, {})
    again.load_newest(state_of(0.0))
    assert again.wait_for_mirror(60) is None and "step-00000020" in copies(run)


def test_a_machine_that_comes_back_goes_on_from_what_others_did_meanwhile(run, tmp_path):
    name_run(run, "a")
    save(run, 10)
    other = run.model_copy(update={"dir": str(shutil.copytree(run.dir, tmp_path / "other"))})
    save(other, 20, 30)
    assert newest(run) == 30


def test_a_place_that_holds_another_run_is_left_as_it_is(run, tmp_path):
    other = run.model_copy(update={"dir": str(tmp_path / "other")})
    name_run(run, "a")
    name_run(other, "b")
    save(run, 10)
    assert "holds another run" in (save(other, 20) or "")
    assert copies(run) == {"step-00000010"}
    with pytest.raises(UserError, match="holds another run"):
        bring_back(other)


def test_a_first_copy_that_was_cut_off_keeps_no_other_run_out(run, tmp_path):
    other = run.model_copy(update={"dir": str(tmp_path / "other")})
    name_run(other, "b")
    Store(run.mirror).upload(Path(other.dir) / "dataset.json", "dataset.json")
    name_run(run, "a")
    bring_back(run)
    assert save(run, 10) is None and copies(run) == {"step-00000010"}


def test_copies_that_may_be_another_runs_come_before_no_checkpoint(run, tmp_path):
    other = run.model_copy(update={"dir": str(tmp_path / "other")})
    save(other, 20)  # as before runs had names
    save(unmirrored(run), 10)
    assert newest(run) == 10


def test_a_place_that_cannot_be_written_is_said_at_the_start(run, s3, impatient):
    s3.fault = lambda handler: "slow down" if handler.command == "PUT" else None
    with pytest.raises(UserError, match=r"run\.mirror="):
        bring_back(run)


def test_a_copy_that_comes_back_in_part_comes_back_at_the_next_start(run, s3, impatient):
    save(run, 10)
    Store(run.mirror).write("recipe.yaml", b"run: {}")
    lose_machine(run)
    s3.fault = lambda x: "slow down" if "recipe" in x.path and x.command == "GET" else None
    with pytest.raises(UserError, match="try again"):
        bring_back(run)
    assert not Path(run.dir).exists()
    s3.fault = lambda *_: None
    assert newest(run) == 10 and (Path(run.dir) / "recipe.yaml").read_bytes() == b"run: {}"


def test_a_store_that_cannot_be_asked_begins_nothing_anew(run, s3, impatient):
    s3.fault = lambda *_: "slow down"
    with pytest.raises(UserError, match=r"run\.mirror=.*begin anew without run\.mirror"):
        bring_back(run)


@pytest.mark.parametrize("protocol", ["file://", ""])
def test_a_folder_of_another_disk_is_a_place_once_it_is_there(run, tmp_path, protocol):
    run = run.model_copy(update={"mirror": f"{protocol}{tmp_path}/mounted/run"})
    with pytest.raises(UserError, match="no such folder: make it, or mount what holds it"):
        bring_back(run)
    Path(f"{tmp_path}/mounted/run").mkdir(parents=True)
    bring_back(run)
    place = Path(f"{tmp_path}/mounted/run")
    assert save(run, 10, 20, 30) is None and copies(run) == {"step-00000020", "step-00000030"}
    assert {path.name for path in place.iterdir()} == copies(run)
    lose_machine(run)
    assert newest(run) == 30
    mirror = Mirror(run)
    mirror.require_writable()
    place.rename(tmp_path / "unmounted")
    with pytest.raises(OSError, match="no such folder"):
        mirror._copy(list_checkpoints(Path(run.dir))[-1])
    assert not place.exists()


def test_a_stop_is_heard_while_a_run_waits_for_its_last_copy(monkeypatch):
    class Slow:
        def wait_for_mirror(self, seconds: float) -> str:
            return "step-00000008 is not in the mirror yet"

    def stop() -> None:
        raise phases.StopRequested

    said = Said()
    await_mirror(Slow(), said, MIRROR_LOOK_S, is_stopping=True)
    assert said.lines == ["warning: step-00000008 is not in the mirror yet"]
    monkeypatch.setattr(phases, "on_check", [stop])
    with pytest.raises(phases.StopRequested):
        await_mirror(Slow(), said, 1200.0)


def test_whatever_a_stores_library_raises_costs_one_copy_only(run, monkeypatch, capfd):
    def cannot(*_: object) -> None:
        raise NotImplementedError("this store removes nothing")

    checkpoints = Checkpoints(run, {})
    with monkeypatch.context() as broken:
        broken.setattr(Store, "remove", cannot)
        checkpoints.save(10, state_of(10.0))
        assert checkpoints.wait() is None and what_is_said_of_a_copy(checkpoints, capfd)
    checkpoints.save(20, state_of(20.0))
    assert checkpoints.wait() is None and checkpoints.wait_for_mirror(60) is None
    assert copies(run) == {"step-00000020"}
