"""Recipes, command lines and environments as users have them: each kind, and what comes of it."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import start_forkserver
from small_recipe import small_recipe

from scale_smog import UserError, load_recipe
from scale_smog.evaluation.protocols import load_protocols
from scale_smog.pretrain import pretrain
from scale_smog.reporting import run_folder

ROOT = Path(__file__).parent.parent.parent

MINIMAL = "run: {steps: 10}\ndata: {path: somewhere}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The one line that a recipe and its overrides are refused with."""
    path = folder / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# Text that YAML takes for something else.
TEXTS = ["no", "off", "0", "null", "2012", "2024-06-01", "010", "1:30", "runs/a #1", "a: b"]
TEXTS += ["[x", "!x", "*x", "&x", "'x'", "@x", "1e3", ".inf", "true", "x, y", "%x", "- x"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_that_holds_text_takes_an_overrides_text_as_it_stands(recipe, text):
    assert load_recipe(recipe, [f"run.dir={text}"]).run.dir == text
    assert load_recipe(recipe, [f"data.path={text}"]).data.path == text
    assert load_protocols([f"features.out={text}"]).features.out == text


def test_a_choice_of_words_quotes_the_word_that_was_given(tmp_path):
    assert "not 'off'" in refusal(tmp_path, MINIMAL, "data.device=off")


def test_a_key_that_holds_a_number_or_a_word_reads_yaml(recipe):
    assert load_recipe(recipe, ["model.batch_norm=8"]).model.batch_norm == 8
    assert load_recipe(recipe, ["model.batch_norm=node"]).model.batch_norm == "node"


@pytest.mark.parametrize("text", ["2024-06-01", "2024-13-45", "010", "1:30", "1.0.1"])
def test_what_only_old_yaml_takes_for_a_date_or_a_number_is_text(tmp_path, text):
    path = tmp_path / "dated.yaml"
    path.write_text(MINIMAL.replace("somewhere", text))
    assert load_recipe(path).data.path == text
    assert f"not '{text}'" in refusal(tmp_path, MINIMAL, f"grouping.num_groups={text}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: c\n", "line 1: a key is a word, not a list or a mapping"),
        ("run: {? {steps: 3} : 4}\n", "line 1: a key is a word"),
        ("run.steps: 10\ndata: {path: x}\n", "write 'run.steps' as 'run: {steps: ...}'"),
        ("[" * 5000, "is not plain YAML"),
        (f"run: {{steps: {'9' * 5000}}}\n", "is not plain YAML"),
        ("run: {steps: !!int many}\n", "is not plain YAML"),
        ("run: {steps: !!timestamp now}\n", "is not plain YAML"),
        (MINIMAL + "---\n" + MINIMAL, "is not plain YAML"),
        ("run:\n\tsteps: 3\n", "is not plain YAML"),
        ("", "a recipe is a mapping of sections"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "override", ["run.epochs=.inf", "optimizer.base_lr=.inf", "model.ema=.nan"]
)
def test_a_number_without_an_end_is_refused(tmp_path, override):
    assert "finite number" in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("key", ["run.seed", "run.steps", "data.global_batch"])
def test_a_number_beyond_64_bits_is_refused(tmp_path, key):
    assert f"key '{key}'" in refusal(tmp_path, MINIMAL, f"{key}={2**63}")


def test_a_mapping_within_a_mapping_is_given_whole(tmp_path):
    said = refusal(tmp_path, MINIMAL, "engine.deepspeed.zero_optimization.reduce_scatter=true")
    whole = "engine.deepspeed={zero_optimization: {reduce_scatter: true}}"
    assert f"'{whole}'" in said
    path = tmp_path / "mapping.yaml"
    path.write_text(MINIMAL)
    assert load_recipe(path, [whole, "engine.kind=zero1"]).engine.deepspeed


def test_an_override_that_is_no_text_is_refused(tmp_path):
    assert "is not UTF-8 text" in refusal(tmp_path, MINIMAL, "run.dir=runs/\udcff")


def test_a_run_folder_that_is_a_file_or_has_an_impossible_name_is_refused(tmp_path, recipe):
    (tmp_path / "file").touch()
    for name in ("file", "file/run", "a" * 300):
        with pytest.raises(UserError, match=r"run\.dir="):
            run_folder.kept_recipe(str(tmp_path / name))
            with run_folder.claimed(load_recipe(recipe, [f"run.dir={tmp_path / name}"]), ""):
                pass


def test_shared_memory_that_is_too_small_is_said_before_the_workers_start(tars, monkeypatch):
    from scale_smog.data import TarDataset
    from scale_smog.data.augment import CentreView
    from scale_smog.data.loaders.batch_source import BatchSource
    from scale_smog.data.loaders.torch import TorchLoader
    from scale_smog.data.plan import EpochPlan

    few = shutil.disk_usage("/dev/shm")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    dataset, cpu = TarDataset(str(tars), "train"), torch.device("cpu")
    source = BatchSource(dataset, EpochPlan(40, 8), [CentreView(224, 1.0)], 0, 0, 1)
    with pytest.raises(UserError, match=r"/dev/shm has 1 MiB for a rank, and 2 workers need 28"):
        TorchLoader(source, range(5), 2, cpu)
    TorchLoader(source, range(5), 0, cpu)


def run_program(*arguments: str, **options: Any) -> tuple[int, str]:
    """Exit status and the last line of what a program of the launcher says."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)
    return ended.returncode, (ended.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hostfile", "nowhere"), "error: no hostfile nowhere"),
        (("--hostfile", "{hosts}", "--include", "nosuch"), "error: no host 'nosuch' in "),
        (("--hostfile", "{hosts}", "--exclude", "a@nosuch:1"), "error: no host 'nosuch' in "),
        (("--include", "a", "--exclude", "b"), "error: --include and --exclude do not go together"),
    ],
)
def test_hosts_that_are_not_there_are_named_before_a_launcher_starts(tmp_path, options, words):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two of them\na slots=2\nb slots=2\n")
    given = [option.format(hosts=hosts) for option in options]
    status, said = run_program("launcher/on_hosts.py", *given, "launcher/pretrain.py", "x.yaml")
    assert status == 2 and said.startswith(words)


def train_without_a_console(folder: Path, tars: Path) -> None:
    """As a process that a shell has started with `umask 077; ... >&- 2>&- <&-`."""
    os.umask(0o077)
    os.closerange(0, 3)
    sys.stdin = sys.stdout = sys.stderr = None
    pretrain(small_recipe(folder, tars, "run.steps=2", "data.loader=synthetic"))


def test_a_closed_console_ends_no_run(tmp_path, tars):
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_without_a_console, args=(tmp_path, tars))
    process.start()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "run" / "results.json").exists()
