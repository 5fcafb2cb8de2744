"""What the tests of this folder share."""

import pytest

from scale_smog.data.prepare import index, verify


@pytest.fixture(autouse=True)
def sets_are_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of two tars starts no worker processes; data/test_sources.py keeps those."""
    for module in (index, verify):
        monkeypatch.setattr(module, "num_usable_cores", lambda: 1)
