"""Followers: what a tracker has is what the run has logged, whatever happens in between."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port
from small_recipe import small_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from scale_smog.data import TarDataset
from scale_smog.errors import UserError
from scale_smog.evaluation.feature_files import _show_in_projector
from scale_smog.recipe import dump_recipe
from scale_smog.reporting.follow import Follower, flat, follow
from scale_smog.reporting.metrics import Metrics
from scale_smog.reporting.starts import has_ended, note_end, note_start
from scale_smog.reporting.trackers import TRACKERS, Mlflow, Point, Tracker
from scale_smog.runtime import run_layout

LOGGED = ("loss", "lr", "images_per_s")


class Run:
    """A run that writes as training does."""

    def __init__(self, folder: Path) -> None:
        self.recipe = small_recipe(folder, "nowhere")
        self.dir = Path(self.recipe.run.dir)
        self.dir.mkdir()
        (self.dir / run_layout.RECIPE_FILE).write_text(dump_recipe(self.recipe))
        self._step = 0

    def goes_on(self, num_steps: int) -> None:
        metrics = Metrics(self.dir, self._step, 1000, 12)
        if self._step == 0:
            metrics.images("views", [torch.zeros(8, 3, 8, 8)])
        for step in range(self._step + 1, self._step + num_steps + 1):
            line = {"step": step, "loss": 5 / step, "chance_loss": 2.3, "lr": 0.1 * math.sin(step)}
            metrics.log(line | {"images_per_s": 100.0 + step, "data_wait": 0.0})
            if step % 4 == 0:
                metrics.scalars(step, {"knn": step / 128})
        metrics.close()
        self._step += num_steps

    def ends(self) -> None:
        note_end(self.dir, self._step)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """As metrics.jsonl has it, or as the run was told."""
        if name == "knn":
            return [(step, step / 128) for step in range(4, self._step + 1, 4)]
        lines = (self.dir / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line[name]) for line in map(json.loads, lines)]


@pytest.fixture(autouse=True)
def event_files_in_the_order_of_their_names(monkeypatch) -> None:
    """TensorBoard counts a process's files and sorts them by name: of one second "10" before "9".

    Only here does a run start twice within a second and a process.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path)
    made.goes_on(60)
    return made


class Recorder(Tracker):
    """A tracker that fails when it is told to, after it has taken so many batches."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.points: list[Point] = []
        self.pictures: list[str] = []
        self.opened: list[str | None] = []
        self.fails_after = fails_after

    def open(self, id: str | None, name: str, config) -> str:
        self.opened.append(id)
        self.config = config
        return id or "first"

    def log(self, points: Sequence[Point]) -> None:
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise ConnectionError("nobody listens")
            self.fails_after -= 1
        self.points += points

    def picture(self, name: str, step: int, png: bytes) -> None:
        assert png.startswith(b"\x89PNG")
        self.pictures.append(name)

    def close(self) -> None:
        pass

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(p.step, p.figures[name]) for p in self.points if name in p.figures]


def test_everything_that_was_logged_is_sent_once_and_the_settings_with_it(run):
    tracker = Recorder()
    follower = Follower(run.dir, "mlflow", tracker)
    for _ in range(3):
        follower.advance()
    assert all(tracker.curve(name) == run.curve(name) for name in LOGGED)
    assert tracker.curve("knn") == run.curve("knn")
    assert tracker.pictures == ["views/0"]
    assert tracker.config["grouping.num_groups"] == 10 and tracker.config["data.path"] == "nowhere"


def test_no_tracker_is_told_a_secret_that_a_url_holds(tmp_path):
    keys = ["data.stream=pipe:curl -H 'Authorization:Bearer s3cret' https://h/a.tar"]
    keys += ["data.loader=stream", "data.allow_pipe=true", "run.mirror=s3://key:s3cret@host/run"]
    settings = flat(small_recipe(tmp_path, "https://h/x?token=s3cret", *keys))
    assert "s3cret" not in str(settings)
    assert settings["data.stream"] == "pipe:..." and settings["run.mirror"] == "s3://host/run"


def test_a_follower_that_is_started_again_goes_on_where_it_was(run):
    first, second = Recorder(), Recorder()
    Follower(run.dir, "mlflow", first).advance()
    run.goes_on(7)
    Follower(run.dir, "mlflow", second).advance()
    assert second.opened == ["first"] and not second.pictures
    for name in LOGGED:
        assert first.curve(name) + second.curve(name) == run.curve(name)
    assert [step for step, _ in second.curve("knn")] == [64]


def test_what_a_tracker_did_not_take_is_sent_again_and_nothing_twice(run, monkeypatch):
    tracker, said = Recorder(fails_after=1), []
    monkeypatch.setitem(TRACKERS, "mlflow", lambda *_: tracker)

    def say(text: str) -> None:
        said.append(text)
        tracker.fails_after = None  # from now on it listens
        run.ends()

    follow(run.dir, "mlflow", "any", every_s=0.01, say=say)
    assert "nobody listens" in said[0] and len(said) == 2
    assert all(tracker.curve(name) == run.curve(name) for name in LOGGED)


def test_with_once_a_tracker_that_fails_is_one_clear_line(run, monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", lambda *_: Recorder(fails_after=0))
    with pytest.raises(UserError, match="mlflow does not take the run's figures: nobody listens"):
        follow(run.dir, "mlflow", "any", once=True)


def test_a_torn_line_waits_for_its_rest(run):
    tracker = Recorder()
    follower = Follower(run.dir, "mlflow", tracker)
    path = run.dir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    follower.advance()
    assert len(tracker.curve("loss")) == 59
    path.write_bytes(whole)
    follower.advance()
    assert tracker.curve("loss") == run.curve("loss")


def test_tensorboard_has_what_was_logged(run, tmp_path):
    follow(run.dir, "tensorboard", "all", str(tmp_path / "boards"), once=True)
    events = EventAccumulator(str(tmp_path / "boards" / "all" / "run"))
    events.Reload()
    for name in (*LOGGED, "knn"):
        kept = [(event.step, event.value) for event in events.Scalars(name)]
        assert kept == [(step, pytest.approx(value)) for step, value in run.curve(name)]
    assert events.Tags()["images"] == ["views/0"]


def test_runs_of_one_name_have_boards_of_their_own(run, tmp_path):
    for machine in ("a", "b"):
        copy = shutil.copytree(run.dir, tmp_path / machine / run.dir.name)
        for _ in range(2):  # the second goes on in the board of the first
            follow(copy, "tensorboard", "all", str(tmp_path / "boards"), once=True)
    first, second = sorted(x.name for x in (tmp_path / "boards" / "all").iterdir())
    assert first == run.dir.name and second.startswith(f"{first}-")


def test_tensorboard_needs_a_folder(run):
    with pytest.raises(UserError, match="needs --server FOLDER"):
        follow(run.dir, "tensorboard", "all", once=True)


class Server:
    """A process that listens at a port of its own, and may die and be started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        self._folder = folder

    def start(self, command: Sequence[str], says: str, **environment: str) -> str:
        """Starts it; returns the first words like `says` that it says from now on."""
        before = self._log.stat().st_size if self._log.exists() else 0
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not (found := re.search(says, self._log.read_text()[before:])):
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        return found[0]

    def dies(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def test_mlflow_is_complete_after_its_server_died_and_came_again(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    server = Server(tmp_path)
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(server.port), "--workers=1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    server.start(command, "startup complete")
    try:
        follower = Follower(run.dir, "mlflow", Mlflow("project", server.url, run.dir))
        follower.advance()
        server.dies()
        run.goes_on(40)  # training knows of nothing
        with pytest.raises(mlflow.exceptions.MlflowException):
            follower.advance()
        server.start(command, "startup complete")
        run.ends()
        follow(run.dir, "mlflow", "project", server.url, every_s=0.1)
        client = mlflow.MlflowClient(tracking_uri=server.url)
        (kept,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
        for name in LOGGED:
            history = client.get_metric_history(kept.info.run_id, name)
            assert sorted((m.step, m.value) for m in history) == run.curve(name)
        history = client.get_metric_history(kept.info.run_id, "knn")
        assert [m.step for m in history] == [step for step, _ in run.curve("knn")]
        assert kept.data.params["grouping.num_groups"] == "10"
        assert kept.info.status == "FINISHED"
        assert [x.path for x in client.list_artifacts(kept.info.run_id, "views")] == ["views/0.png"]
    finally:
        server.dies()


def python(code: str, **environment: str) -> str:
    """What a new process prints: these libraries read their environment when they are imported."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FOLLOW = "from scale_smog.cli.main import main; main({words!r})"


def trackio_curve(name: str, run: str, environment: dict[str, str]) -> list[tuple[int, float]]:
    words = ["trackio", "get", "metric", "--project", "scale_smog", "--json"]
    words += ["--run", run, "--metric", name]
    code = f"import sys; from trackio.cli import main; sys.argv = {words!r}; main()"
    return [(x["step"], x["value"]) for x in json.loads(python(code, **environment))["values"]]


def test_trackio_keeps_what_was_logged_and_goes_on(run, tmp_path):
    pytest.importorskip("trackio", reason="needs trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    code = FOLLOW.format(words=["follow", str(run.dir), "--to", "trackio", "--once"])
    python(code, **environment)
    run.goes_on(20)
    python(code, **environment)
    name = json.loads((run.dir / "follow-trackio.json").read_text())["id"]
    for figure in (*LOGGED, "knn"):
        assert trackio_curve(figure, name, environment) == run.curve(figure)


def test_trackio_is_complete_after_its_server_died_and_came_again(run, tmp_path):
    pytest.importorskip("trackio", reason="needs trackio")
    server = Server(tmp_path)
    serves = {"TRACKIO_DIR": str(tmp_path / "theirs"), "HF_HUB_OFFLINE": "1"}
    sends = {"TRACKIO_DIR": str(tmp_path / "ours"), "HF_HUB_OFFLINE": "1"}
    show = f"import trackio as t; t.show(open_browser=False, server_port={server.port})"

    def started() -> list[str]:
        url = server.start([sys.executable, "-uc", show], r"http\S+write_token=\S+", **serves)
        return ["follow", str(run.dir), "--to", "trackio", "--once", "--server", url]

    try:
        words = started()
        python(FOLLOW.format(words=words), **sends)
        server.dies()
        run.goes_on(20)
        left_alone = FOLLOW.format(words=words)
        subprocess.run([sys.executable, "-c", left_alone], env=os.environ | sends)
        python(FOLLOW.format(words=started()), **sends)
    finally:
        server.dies()
    name = json.loads((run.dir / "follow-trackio.json").read_text())["id"]
    for figure in (*LOGGED, "knn"):
        assert trackio_curve(figure, name, serves) == run.curve(figure)


def test_wandb_offline_keeps_what_was_logged(run):
    pytest.importorskip("wandb", reason="needs wandb")
    code = FOLLOW.format(words=["follow", str(run.dir), "--to", "wandb", "--once"])
    python(code, WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = (run.dir / "wandb").glob("offline-run-*/run-*.wandb")
    read = f"""
import json
from wandb.proto import wandb_internal_pb2
lines = []
for data in {wandb_records(file.read_bytes())!r}:
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        lines.append({{i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}})
print(json.dumps(lines))
"""
    lines = json.loads(python(read))
    for name in (*LOGGED, "knn"):
        assert [(x["step"], x[name]) for x in lines if name in x] == run.curve(name)


def wandb_records(content: bytes) -> list[bytes]:
    """Of a .wandb file, which is LevelDB's log: blocks of 32 KiB, records in up to many pieces."""
    records, place, pieces = [], 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            records.append(pieces)
            pieces = b""
    return records


def test_other_events_of_the_run_do_not_end_what_is_read(run, tars):
    tracker = Recorder()
    follower = Follower(run.dir, "mlflow", tracker)
    follower.advance()
    _show_in_projector(run.dir, "train", np.arange(8), torch.eye(8), TarDataset(tars, "train"))
    run.goes_on(8)
    follower.advance()
    assert tracker.curve("knn") == run.curve("knn")


def test_a_run_that_is_started_again_has_not_ended(run):
    assert not has_ended(run.dir)
    run.ends()
    assert has_ended(run.dir)
    note_start(run.recipe, 60, torch.device("cpu"))
    assert not has_ended(run.dir)
