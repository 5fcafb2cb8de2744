"""Reading the files of a batch: by one thread where that is fast, by many where it is slow."""

import threading
import time
from typing import Any, cast

import numpy as np
import pytest

from scale_smog.data import EpochPlan
from scale_smog.data.loaders import batch_source
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.errors import UserError

IDS = np.array([3, 1, 2, 0] * 16)


class SlowImages:
    """Images of one byte, their id, that take two milliseconds each."""

    def __init__(self) -> None:
        self.threads: list[int] = []  # that read each image
        self.others_read = threading.Event()
        self.needs_help = False

    def read(self, sample_id: int) -> bytes:
        self.threads.append(threading.get_ident())
        time.sleep(0.002)
        if threading.get_ident() != self.threads[0]:
            self.others_read.set()
        elif self.needs_help and len(self.threads) > 20:  # however busy the machine is
            assert self.others_read.wait(60), "nobody helps"
        if sample_id == 9:
            raise UserError("sample 9 is damaged")
        return bytes([sample_id])


@pytest.fixture
def images() -> SlowImages:
    return SlowImages()


def read(images: SlowImages, ids: np.ndarray) -> list[int]:
    source = BatchSource(cast(Any, images), EpochPlan(64, 64), [], 0, 0, 1)
    return [int(content[0]) for content in source.encoded(ids)]


def test_threads_help_where_files_come_slowly_and_keep_their_order(images):
    images.needs_help = True
    assert read(images, IDS) == IDS.tolist()
    assert len(set(images.threads)) > 1


def test_one_thread_reads_where_files_come_fast(images, monkeypatch):
    monkeypatch.setattr(batch_source, "SLOW_READ_S", 60.0)
    assert read(images, IDS) == IDS.tolist()
    assert set(images.threads) == {threading.get_ident()}


@pytest.mark.parametrize("place", [0, 40, 63])
def test_a_damaged_file_is_said_whichever_thread_reads_it(images, place):
    ids = IDS.copy()
    ids[place] = 9
    with pytest.raises(UserError, match="sample 9 is damaged"):
        read(images, ids)
