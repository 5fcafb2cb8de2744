"""What several tests share."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import make_dataset

# Ranks and loaders of a test must not fight over the cores with many threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files of minutes begin first: one that begins last keeps a single process busy at the end.
LONGEST = (
    "test_engines_agree.py",
    "test_faults.py",
    "test_demo_curve.py",
    "test_programs.py",
    "test_resume.py",
    "test_wide_nets.py",
    "test_launchers.py",
    "test_check.py",
    "test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by their file, the longest first."""
    items.sort(key=lambda x: LONGEST.index(x.path.name) if x.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training and twenty test images of about 40 px in four classes, as tar shards."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a reader may still be there
