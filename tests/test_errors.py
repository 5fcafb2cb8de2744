"""Promises of how programs report a user's mistake."""

import socket

import pytest

from scale_smog import errors
from scale_smog.errors import CommonError, UserError, exits_on_user_error, first_few


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({}, "error: no key 'x'\n"),
        ({"RANK": "0", "SLURM_PROCID": "3"}, "error: no key 'x'\n"),
        ({"SLURM_PROCID": "0"}, "error: no key 'x'\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ""),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, f"error: {socket.gethostname()}: no key 'x'\n"),
    ],
)
def test_every_rank_exits_with_2_and_the_first_of_each_host_prints_one_line(
    environment, printed, monkeypatch, capsys
):
    monkeypatch.setattr(errors, "HOLD_BACK_S", 0.0)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_info, exits_on_user_error():
        raise UserError("no key\n 'x'")
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", printed)


def test_what_all_ranks_are_known_to_have_met_rank_0_says_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit), exits_on_user_error():
        raise CommonError("no key 'x'")
    assert capsys.readouterr() == ("", "")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exits_on_user_error():
        raise ZeroDivisionError


def test_names_that_are_left_out_are_counted():
    assert first_few(["a", "b"]) == "a, b" and first_few([]) == ""
    assert first_few([str(i) for i in range(10)], "; ", most=3) == "0; 1; 2 and 7 more"
