"""Random numbers as a pure function of a counter, so that randomness needs no state.

Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.
"""

import numpy as np

# Streams: what the draws for one number are for. A view's augmentation takes the view's own number.
ORDERS = -1  # of an epoch's samples, and of the rows that a k-means begins with
DROP_PATH = 2**20  # of the first view; the others' follow
RANDOM_SELECT = 2**21  # of groups, an operator

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def random_words(
    seed: int, sample_ids: np.ndarray, epochs: np.ndarray | int, stream: int, num_words: int
) -> np.ndarray:
    """Random 32-bit words, one row a sample, keyed by the seed and counting the other arguments.

    Args:
        seed: of the run, below 2**64.
        sample_ids: [N] int, below 2**32.
        epochs: [N] int or one for all.
        stream: one of those above.
        num_words: draws a sample.

    Returns:
        [N, num_words] uint64, each below 2**32.
    """
    num_blocks = -(-num_words // 4)
    counter = np.zeros((4, len(sample_ids), num_blocks), dtype=np.uint64)
    counter[0] = np.asarray(sample_ids, dtype=np.uint64)[:, None]
    counter[1] = np.broadcast_to(np.asarray(epochs, dtype=np.uint64), len(sample_ids))[:, None]
    counter[2] = stream + 1
    counter[3] = np.arange(num_blocks, dtype=np.uint64)
    words = philox(counter, seed)  # [4, N, blocks]
    return words.transpose(1, 2, 0).reshape(len(sample_ids), -1)[:, :num_words]


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 of counters [4, ...] (uint64 holding 32-bit words) under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(
    seed: int, sample_ids: np.ndarray, epochs: np.ndarray, stream: int, num_words: int
) -> np.ndarray:
    """`random_words` as float64 in [0, 1): [N, num_words]."""
    return random_words(seed, sample_ids, epochs, stream, num_words) * 2.0**-32


def permutation(num: int, seed: int) -> np.ndarray:
    """A random order of 0..num - 1, int64 [num], the same with any version of numpy."""
    # numpy may change what its permutation() returns; the raw stream of a bit generator is fixed.
    return np.argsort(np.random.Philox(key=seed).random_raw(num), kind="stable")
