"""Files that several processes write."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scale_smog.runtime.files import locked


def add_one(path: Path) -> None:
    with locked(path):
        number = int(path.read_text())
        time.sleep(0.001)  # for another one to read the same
        path.write_text(str(number + 1))


def test_a_locked_file_is_changed_by_one_at_a_time_and_no_lock_is_left(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, [path] * 100))
    assert path.read_text() == "100"
    assert [x.name for x in tmp_path.iterdir()] == ["number"]
