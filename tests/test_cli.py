"""`smog`: one command for all programs, from a checkout and from a wheel alike."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import scale_smog.export
from scale_smog.cli import evaluate, export
from scale_smog.cli.main import COMMANDS, main
from scale_smog.evaluation.program import PROGRAMS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pydantic", "deepspeed", "matplotlib", "tensorboard", "PIL", "numpy")


def smog(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command in this process; its exit status and all that it printed."""
    with pytest.raises(SystemExit) as end:
        main(words)
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err


def test_the_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom scale_smog.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('imported', [x for x in {HEAVY} if x in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("imported []\n")
    assert all(re.search(rf"^ +{name}\b", shown.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help(name, capsys) -> None:
    status, text = smog(name, "--help", capsys=capsys)
    assert status == 0 and text.startswith(f"usage: smog {name}")


@pytest.mark.parametrize("name", ["recipes", "explain"])
def test_a_reader_who_has_read_enough_gets_no_traceback(name) -> None:
    code = f"from scale_smog.cli.main import main; main([{name!r}])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout and started.stderr
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("folder", ["launcher", "data_tools"])
def test_a_file_and_its_command_are_one_program(folder, capsys) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.stem in COMMANDS:
            _, text = smog(path.stem, "--help", capsys=capsys)
            own = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
            assert own.stdout.split() == text.replace(f"smog {path.stem}", path.name, 1).split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "invalid choice: 'pretrian'"),
        (["pretrain", "r50x5"], "did you mean 'r50x4'"),
        (["check"], "give a RECIPE, or --doctor RUN_DIR"),
        (["explain", "data.ordr"], "did you mean 'data.order'"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_with_2_and_says_what_is_wrong(words, message, capsys) -> None:
    status, text = smog(*words, capsys=capsys)
    assert status == 2 and message in text and "Traceback" not in text


def test_commands_offer_what_the_package_has() -> None:
    assert set(evaluate.EVALUATIONS) == set(PROGRAMS)
    assert export.FORMATS == scale_smog.export.FORMATS


def test_a_dry_run_imports_only_what_it_needs(tmp_path) -> None:
    code = (
        "import sys\nfrom scale_smog.cli.main import main\n"
        "try: main(['pretrain', 'r50', '--dry-run'])\nexcept SystemExit: pass\n"
        "print('imported', *{x.partition('.')[0] for x in sys.modules})"
    )
    run_in = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    *_, last = subprocess.run([sys.executable, "-c", code], **run_in).stdout.splitlines()
    unused = {"torchvision", "deepspeed", "matplotlib", "PIL", "tensorboard", "nvidia", "timm"}
    assert "torch" in last.split() and not unused & set(last.split())


def test_a_dry_run_needs_no_dataset(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = smog("pretrain", "r50", "--dry-run", capsys=capsys)
    assert status == 0 and "data.path=imagenet is not there" in text
    assert re.search(r"^steps +250227 \(400.00 epochs\)", text, re.MULTILINE)
    _, text = smog("pretrain", "cifar10_r18", "data.num_images=5000", "--dry-run", capsys=capsys)
    assert "\nsmall data: grouping.num_groups=200 (5000 images)\n" in text
    assert "num_groups: 200" in text and re.search(r"^images +5000 ", text, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "blocked_before"),
    [
        ("runpy.run_path('launcher/pretrain.py', run_name='__main__')", "scale_smog.cli.main"),
        ("from scale_smog.cli.main import main; main(['pretrain', 'r50'])", "scale_smog.pretrain"),
    ],
)
def test_stop_signals_wait_while_libraries_are_imported(start, blocked_before) -> None:
    code = f"""
import runpy, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {blocked_before!r}:
            print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
            raise SystemExit
sys.meta_path.insert(0, Watch())
sys.argv = ["pretrain.py", "r50"]
{start}
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == [str(int(x)) for x in (signal.SIGUSR1, signal.SIGTERM)]


def test_recipes_are_listed_and_printed(capsys) -> None:
    _, text = smog("recipes", capsys=capsys)
    assert len(text.splitlines()) == len(list((ROOT / "recipes").rglob("*.yaml")))
    assert re.search(r"^r50x4 +ResNet-50 x4", text, re.MULTILINE)
    _, text = smog("recipes", "ablations/7a_beta_to_0.9", capsys=capsys)
    file = (ROOT / "recipes" / "ablations" / "7a_beta_to_0.9.yaml").read_text()
    assert text == file.partition("\n")[2]


@pytest.mark.parametrize(
    ("line", "expected"), [("smog pre", "pretrain"), ("smog throughput --cal", "--calibrate")]
)
def test_the_shell_completes_commands_and_options(line, expected, tmp_path) -> None:
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    subprocess.run([sys.executable, "-m", "scale_smog"], env=environment, check=True)
    assert (tmp_path / "words").read_text().split() == [expected]
