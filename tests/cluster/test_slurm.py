"""`launcher/slurm.sbatch` with stand-ins for SLURM's programs, and its lint."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hosts import ROOT

PATIENCE_S = 120
SCRIPT = ROOT / "launcher" / "slurm.sbatch"
# srun starts its program twice, with the variables of two tasks on two nodes, as SLURM would.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
echo "srun $MASTER_ADDR $MASTER_PORT $*" >> "$LOG"
[[ -z ${DEAF:-} ]] || exec sleep 60
export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE="1(x2)"
pids=()
told=
trap 'told=USR1' USR1
trap 'told=TERM' TERM
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
[[ -z $told ]] || kill "-$told" "${pids[@]}"
worst=0
for pid in "${pids[@]}"; do
    while wait "$pid" && status=0 || status=$?; kill -0 "$pid" 2>/dev/null; do :; done
    ((status > worst)) && worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
[[ $1 != show ]] || printf 'localhost\\nother\\n'
"""
# Stands for Python: a program that ends at once, or, as the training, when it is told to. It says
# that it is there when it listens to signals.
PYTHON = """#!/bin/bash
[[ $1 == *check.py ]] || trap 'echo "$SLURM_PROCID saved" >> "$LOG"; exit 0' USR1 TERM
echo "$SLURM_PROCID $*" >> "$LOG"
[[ $1 == *check.py && -n ${CHECK_HANGS:-} ]] && sleep 20
[[ $1 == *check.py ]] && exit "${CHECK_STATUS:-0}"
[[ -z ${TRAIN_STATUS:-} ]] || exit "$TRAIN_STATUS"
for _ in $(seq 4000); do sleep 0.05; done
"""


def start(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    facts = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
    facts |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python")}
    facts |= {"LOG": str(folder / "log"), **environment}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=os.environ | facts)


def wait_for_line(log: Path, line: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not (log.exists() and line in log.read_text()):
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.02)


def test_a_job_that_runs_out_of_time_saves_and_goes_back_into_the_queue(tmp_path):
    job, log = start(tmp_path, "r.yaml", "run.seed=1"), tmp_path / "log"
    for task in (0, 1):
        wait_for_line(log, f"{task} launcher/pretrain.py r.yaml run.seed=1")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_S) == 0
    lines = log.read_text().splitlines()
    assert lines.index("0 launcher/check.py r.yaml run.seed=1") < lines.index("1 saved")
    assert {"0 saved", "1 saved"} <= set(lines) and lines[-1] == "scontrol requeue 17"
    assert any(line.startswith("srun localhost 20017 ") for line in lines)


def test_a_job_whose_time_is_up_before_srun_listens_goes_back_into_the_queue(tmp_path):
    job, log = start(tmp_path, "r.yaml", SLURM_RESTART_COUNT="1", DEAF="yes"), tmp_path / "log"
    wait_for_line(log, "launcher/pretrain.py r.yaml")
    job.send_signal(signal.SIGUSR1)
    job.wait(PATIENCE_S)
    assert log.read_text().splitlines()[-1] == "scontrol requeue 17"


@pytest.mark.parametrize(
    ("status", "restarts", "comes_back"),
    [(3, 0, True), (134, 9, True), (134, 10, False), (1, 0, False), (137, 0, False)],
)
def test_a_job_that_lost_a_node_comes_back_and_one_that_is_wrong_does_not(
    tmp_path, status, restarts, comes_back
):
    facts = {"TRAIN_STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
    assert start(tmp_path, "r.yaml", **facts).wait(PATIENCE_S) == status
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert (last == "scontrol requeue 17") == comes_back


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(tmp_path):
    job, log = start(tmp_path, "r.yaml", SLURM_RESTART_COUNT="1"), tmp_path / "log"
    for task in (0, 1):
        wait_for_line(log, f"{task} launcher/pretrain.py r.yaml")
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE_S) == 0
    said = log.read_text()
    assert "1 saved" in said and "requeue" not in said and "check.py" not in said


def test_a_fault_ends_the_job_before_the_training(tmp_path):
    assert start(tmp_path, "r.yaml", CHECK_STATUS="2").wait(PATIENCE_S) == 2
    assert "pretrain.py" not in (tmp_path / "log").read_text()
    assert subprocess.run(["bash", SCRIPT], capture_output=True).returncode == 2


def test_a_time_limit_that_comes_while_the_dataset_is_read_loses_no_job(tmp_path):
    job, log = start(tmp_path, "r.yaml", CHECK_HANGS="yes"), tmp_path / "log"
    wait_for_line(log, "1 launcher/check.py r.yaml")
    job.send_signal(signal.SIGUSR1)
    job.wait(PATIENCE_S)
    assert "scontrol requeue 17" in log.read_text() and "pretrain.py" not in log.read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_the_script_passes_shellcheck():
    ended = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
