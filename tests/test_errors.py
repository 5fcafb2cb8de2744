"""Promises of how programs report a user's mistake."""

import pytest

from scale_smog.errors import UserError, exits_on_user_error


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({}, "error: no key 'x'\n"),
        ({"RANK": "0", "SLURM_PROCID": "3"}, "error: no key 'x'\n"),
        ({"SLURM_PROCID": "0"}, "error: no key 'x'\n"),
        ({"RANK": "1"}, ""),
        ({"SLURM_PROCID": "2"}, ""),
    ],
)
def test_every_rank_exits_with_2_and_only_rank_0_prints_one_line(
    environment, printed, monkeypatch, capsys
):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_info, exits_on_user_error():
        raise UserError("no key\n 'x'")
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", printed)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exits_on_user_error():
        raise ZeroDivisionError
