"""Rows drawn from those of all ranks by their global numbers, alike on every rank."""

import numpy as np
import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.counter_rng import ORDERS, random_words


def draw_distinct(num: int, num_rows: int, seed: int, draw: int, device: torch.device) -> Tensor:
    """Distinct numbers [num] int64 below `num_rows`; `draw` tells apart the times of drawing."""
    words = random_words(seed, np.arange(num_rows), draw, ORDERS, num_words=1)[:, 0]
    return torch.from_numpy(np.argsort(words, kind="stable")[:num].copy()).to(device)


def gather_rows(own: Tensor, row: Tensor, is_own: Tensor) -> Tensor:
    """The rows [K, D] of all ranks, each from the one that has it; a collective, differentiable.

    Args:
        own: this rank's rows [n, D].
        row: of `own`, for each of those that are wanted [K] int64; any number where it has not.
        is_own: whether this rank has it [K].
    """
    rows = own[row.clamp(0, len(own) - 1)] * is_own[:, None]
    return distributed.differentiable_all_reduce(rows)  # one rank's row + zeros
