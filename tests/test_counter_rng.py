"""Counter-based random numbers."""

import numpy as np
import pytest

from scale_smog.counter_rng import philox, random_words, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    """Known answers of the Random123 distribution for philox4x32-10."""
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]
    assert words.tolist() == expected


def test_a_rows_draws_do_not_depend_on_the_other_rows():
    together = random_words(7, np.arange(100), 3, stream=1, num_words=9)
    alone = random_words(7, np.array([42]), 3, stream=1, num_words=9)
    assert (together[42] == alone[0]).all()


def test_seed_sample_epoch_and_stream_all_change_the_draws():
    def draw(seed=1, sample=2, epoch=3, stream=4):
        return random_words(seed, np.array([sample]), epoch, stream, num_words=8)[0]

    changed = [draw(seed=9), draw(sample=9), draw(epoch=9), draw(stream=9)]
    assert all((draw() != other).any() for other in changed)


def test_uniforms_are_uniform():
    draws = uniforms(0, np.arange(20_000), np.zeros(20_000, dtype=int), 0, 4)
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert np.abs(counts / counts.mean() - 1).max() < 0.08  # 4,000 a bin: 5 sigma
