"""The throughput program: profile.json, its arithmetic, and its modes."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from small_recipe import small_recipe, write_small_recipe

from scale_smog.config import MethodConfig
from scale_smog.errors import UserError
from scale_smog.loop import train_step
from scale_smog.methods import METHODS
from scale_smog.profiling import step_profile
from scale_smog.profiling.hardware import FOLDER, load_hardware
from scale_smog.profiling.step_profile import PARTS, Timeline, timed
from scale_smog.reporting import run_folder
from scale_smog.state import build_state
from scale_smog.throughput import (
    FIXED_VALUES,
    Options,
    build_batches,
    profile_on,
    timed_methods,
    without_resets,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
NET = ("data.large_px=64", "data.global_batch=16", "grouping.kmeans=false", "grouping.init=random")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seconds_of_the_processor(monkeypatch) -> None:
    """What a busy machine does between two parts of a step is no part of it."""
    monkeypatch.setattr(step_profile, "time", SimpleNamespace(perf_counter=time.thread_time))


def run_program(monkeypatch, *arguments: str) -> int:
    """Runs launcher/throughput.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "launcher" / "throughput.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_program_writes_profile_trace_and_plot(tmp_path, tars, monkeypatch, capsys):
    recipe = str(write_small_recipe(tmp_path, tars))
    assert run_program(monkeypatch, recipe, "--steps", "4", "--warm-up", "1") == 0
    facts = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert list(facts["parts"]) == list(PARTS)
    assert facts["images_per_s"] == pytest.approx(12 / facts["step_s"])
    assert {"exposed_s", "hidden_s"} == set(facts["communication"])
    assert 0 < facts["mfu"] < 1 and 0 < facts["roofline_fraction"] < 1
    for row in facts["predictions"]:
        assert set(row) == {"gpus", "engine", "batch_norm", "images_per_s", "efficiency"}
        assert row["images_per_s"] == sorted(row["images_per_s"])
    assert {row["gpus"] for row in facts["predictions"]} >= {8, 64, 256, 1024}
    trace = json.loads((tmp_path / "run" / "trace" / "rank0.pt.trace.json").read_text())
    assert any(event.get("name") == "part: backward" for event in trace["traceEvents"])
    assert (tmp_path / "run" / "scaling.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "PREDICTED" in said and facts["bottleneck"] in said


def test_a_profiled_folder_can_still_be_trained_in(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars)
    profile_on(CPU, recipe, Options(num_steps=1, num_warm_up=1, trace=False))
    assert (tmp_path / "run" / "profile.json").exists()
    with run_folder.claimed(recipe, "hash") as changes:
        assert changes == []


def test_parts_add_up_and_what_belongs_to_none_is_small(tmp_path, seconds_of_the_processor):
    options = Options(num_steps=8, synthetic=True, trace=False)
    facts = profile_on(CPU, small_recipe(tmp_path, "", *NET), options)
    parts = facts["parts"]
    assert sum(parts.values()) == pytest.approx(facts["step_s"], rel=0.03)
    assert parts["other"] <= 0.05 * facts["step_s"]
    assert parts["online_forward"] > 0 and parts["backward"] > parts["momentum_forward"] > 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != MethodConfig().name])
def test_the_parts_of_every_method_are_found(tmp_path, seconds_of_the_processor, name):
    options = Options(num_steps=3, synthetic=True, trace=False)
    facts = profile_on(CPU, small_recipe(tmp_path, "", *NET, f"method.name={name}"), options)
    parts, nets = facts["parts"], small_recipe(tmp_path, "", f"method.name={name}").nets
    assert parts["grouping"] > 0 and parts["other"] <= 0.1 * facts["step_s"]
    assert (parts["momentum_forward"] > 0) == (nets.num_momentum_views > 0)


def test_twice_the_batch_takes_about_twice_as_long_forward(tmp_path, seconds_of_the_processor):
    timelines = {batch: Timeline(CPU) for batch in (16, 32)}
    sides = {}
    for batch in timelines:
        recipe = small_recipe(tmp_path, "", *NET, f"data.global_batch={batch}")
        images = next(iter(build_batches(recipe, batch, 1, True, CPU)))
        sides[batch] = (build_state(recipe, batch, CPU), images)
    for _ in range(12):  # in turns: a machine that is busy meanwhile slows both
        for batch, (state, images) in sides.items():
            timeline = timelines[batch]
            with timed(timeline, timed_methods(state)), timeline.step():
                train_step(state, images, FIXED_VALUES)
    fastest = {
        batch: min(step["online_forward"] for step in timeline.durations())
        for batch, timeline in timelines.items()
    }
    assert 1.4 <= fastest[32] / fastest[16] <= 2.6


def test_the_loader_alone_and_random_views_need_no_nets_and_no_dataset(tmp_path, tars, monkeypatch):
    recipe = str(write_small_recipe(tmp_path, tars))
    assert run_program(monkeypatch, recipe, "--loader-only", "--steps", "3") == 0
    facts = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert facts["images_per_s"] > 0 and "parts" not in facts
    nowhere = str(write_small_recipe(tmp_path, "nowhere"))
    assert run_program(monkeypatch, nowhere, "--synthetic", "--steps", "2", "--no-trace") == 0


def test_mistakes_get_one_line(tmp_path, tars, monkeypatch, capsys):
    recipe = str(write_small_recipe(tmp_path, tars))
    assert run_program(monkeypatch, recipe, "--hardware", "h300") == 2
    assert capsys.readouterr().err == (
        "error: no hardware file h300: give a path, or one of a100, h100, h200\n"
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(", fp32: 67", "", "fp32 is missing"), ("[460, 420", "[0, 420", "gb_per_s")],
)
def test_a_hardware_file_that_lacks_what_predictions_need_is_refused(
    tmp_path, before, after, words
):
    text = (FOLDER / "h100.yaml").read_text()
    assert before in text
    (tmp_path / "own.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=words):
        load_hardware(str(tmp_path / "own.yaml"))


def _profile_rank(folder: Path) -> dict:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    recipe = small_recipe(folder, "", *NET, "engine.kind=ddp", "model.batch_norm=global")
    return profile_on(CPU, recipe, Options(num_steps=6, synthetic=True, calibrate=True))


def test_two_ranks_report_the_communication_that_they_waited_for(tmp_path):
    first, second = run_on_ranks(2, _profile_rank, tmp_path)
    for facts in (first, second):
        assert facts["parts"]["communication"] > 0
        assert sum(facts["parts"].values()) == pytest.approx(facts["step_s"], rel=0.03)
    links = first["measured_links"]
    # A job on a part of one node says nothing of how many GPUs a node has.
    assert links["gpus_per_node"] == 8 and links["node"]["gb_per_s"][1] > 0.01


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names} or name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import scale_smog.data.prepare.shard, scale_smog.throughput
"""


def test_a_step_needs_no_library_of_one_loader_one_engine_or_pictures():
    names = ("webdataset", "braceexpand", "psutil", "deepspeed", "matplotlib")
    program = WITHOUT.format(names=names)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_step_that_is_measured_is_the_methods_own_not_that_of_its_start(tmp_path):
    recipe = small_recipe(tmp_path, "x", "grouping.instance_warmup_steps=50")
    state = build_state(without_resets(recipe), 4, torch.device("cpu"))
    batch = next(iter(build_batches(recipe, 4, 1, True, torch.device("cpu"))))
    assert train_step(state, batch, FIXED_VALUES).usage is not None  # images were put into groups
