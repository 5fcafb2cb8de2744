"""What several tests share."""

import os
from pathlib import Path

import pytest
from images import make_dataset

# Ranks and loaders of a test must not fight over the cores with many threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training and twenty test images of about 40 px in four classes, as tar shards."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))
