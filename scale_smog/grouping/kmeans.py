"""Spherical k-means over features spread over ranks, the same to the bit at any number of ranks.

Sums are integers, so their order does not matter; near ties of a float32 assignment are decided
in float64, so it does not matter either which kernel or chunk a row went through.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor

from scale_smog.distributed import all_reduce
from scale_smog.errors import UserError
from scale_smog.grouping.precision import full_float32
from scale_smog.runtime import phases

CHUNK_ROWS = 2048  # a [2048, 3000] float32 tile of scores fits an H200's second-level cache
CPU_TILE = 2**19  # scores, 2 MiB: about a core's
NEAR_TIE = 1e-6  # well above the rounding of a float32 dot product of unit vectors
EXACT_TIE = 1e-12  # the same for float64: closer scores are equal
LIMITS = 9  # of slow and fast centroids, that are tried
EXACT_ROWS = 256  # their [256, 3000] float64 scores stay small when all features are alike

SUM_SCALE = 2.0**40  # fixed point of the sums: int64 holds 8.4 M unit rows in one cluster
SUM_ROWS = 8192  # whole numbers up to 2^53 = 8192 * 2^40 are exact in float64
INERTIA_SCALE = 2.0**36  # a row adds at most 4
SPLIT_TILT = 1 / 1024


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and what belongs to them; N rows on this rank, K centroids."""

    centroids: Tensor  # [K, D] float32, unit rows
    assignments: Tensor  # [N] int64, of this rank's rows
    counts: Tensor  # [K] int64, over all ranks
    inertia: float  # sum of |x - c|^2 over all ranks
    num_splits: int  # empty clusters that took half of a large one, over all iterations


@torch.no_grad()
def spherical_kmeans(
    features: Tensor,
    centroids: Tensor,
    *,
    iterations: int,
    process_group: dist.ProcessGroup | None = None,
) -> KMeansResult:
    """Exactly `iterations` rounds of Lloyd's algorithm on the unit sphere.

    A row goes to the centroid of greatest dot product, the first among equals; rows of zeros
    therefore to centroid 0, which they do not move. An empty cluster splits a large one.

    Args:
        features: this rank's unit rows [N, D] float32; N may differ between ranks and may be 0.
        centroids: start [K, D], equal on all ranks.
        iterations: updates of the centroids.
        process_group: ranks that share the rows; None is the default group where there is one.

    Returns:
        The last centroids and the assignments, counts and inertia that belong to them.

    Raises:
        UserError: a row is not finite, or there are no rows at all. Raised on every rank.
    """
    features = features.detach().float()
    centroids = F.normalize(centroids.detach().float())
    _check_rows(features, process_group)
    sums = torch.zeros(len(centroids), features.shape[1] + 1, dtype=torch.int64).to(features.device)
    num_splits = 0
    with full_float32(features.device), _one_thread_an_operation(features) as num_threads:
        nearest, score, second = assign(features, centroids, num_threads=num_threads)
        add_rows(sums, features, nearest, 1)
        for _ in range(iterations):
            phases.check_for_stop()
            totals = all_reduce(sums.clone(), process_group)  # [K, D + 1]
            before, (centroids, splits) = centroids, _next_centroids(centroids, totals)
            if torch.equal(centroids, before):
                break  # the rounds that remain would change nothing
            num_splits += int(splits)
            left = nearest.clone()
            reassign(nearest, score, second, features, before, centroids, num_threads)
            for moved in (left != nearest).nonzero()[:, 0].split(SUM_ROWS):
                rows = features.index_select(0, moved)
                add_rows(sums, rows, left[moved], -1)  # exact, so they can be mended
                add_rows(sums, rows, nearest[moved], 1)
        inertia = _inertia(features, nearest, centroids)
    own = torch.cat([sums[:, -1], inertia])  # [K + 1]
    totals = all_reduce(own, process_group)
    inertia = totals[-1].item() / INERTIA_SCALE
    return KMeansResult(centroids, nearest, totals[:-1], inertia, num_splits)


def _check_rows(features: Tensor, group: dist.ProcessGroup | None) -> None:
    bad = (~features.sum(dim=1).isfinite()).sum()  # ten times as fast as asking every value
    facts = all_reduce(torch.stack([bad, bad.new_tensor(len(features))]), group).tolist()
    if facts[0]:
        raise UserError(f"k-means: {facts[0]} of {facts[1]} features are not finite")
    if not facts[1]:
        raise UserError("k-means: no features to cluster")


@contextmanager
def _one_thread_an_operation(features: Tensor) -> Iterator[int]:
    """On a CPU, inside; gives the number of threads that chunks of rows are spread over instead.

    An operation that is spread over threads ends with the slowest of them. Beside a busy process
    some thousand short ones took k-means six times as long.
    """
    num_threads = torch.get_num_threads()
    if not features.is_cpu:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)


def assign(
    features: Tensor, centroids: Tensor, index: Tensor | None = None, *, num_threads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid of unit rows, the first among equals.

    Args:
        features: rows [N, D].
        centroids: [K, D].
        index: which rows [M] int64; default: all.
        num_threads: on a CPU.

    Returns:
        nearest [M] int64, its score and the second highest score [M] float64.
    """
    if index is None:
        index = torch.arange(len(features), device=features.device)
    nearest, highest, second = _scan(features, index, centroids, num_threads)
    for tied in (highest - second <= NEAR_TIE).nonzero()[:, 0].split(EXACT_ROWS):
        nearest[tied] = _nearest_exactly(features[index[tied]], centroids)
    return nearest, highest.double(), second.double()


def reassign(
    nearest: Tensor,
    score: Tensor,
    second: Tensor,
    features: Tensor,
    before: Tensor,
    centroids: Tensor,
    num_threads: int = 1,
) -> None:
    """Mends the assignment of rows to centroids `before` for those that they have become, in place.

    A score changes by no more than its centroid moved. So a row whose lead is larger than what its
    own centroid and the slow ones moved stays, unless a fast one has overtaken: most rows are
    compared with these only (bounds as in Hamerly, SDM 2010, and Ding et al., ICML 2015).

    Args:
        nearest: centroid of each row [N] int64.
        score: at most what the row scores there [N] float64.
        second: at least what it scores anywhere else [N] float64.
        features: rows [N, D].
        before, centroids: [K, D].
        num_threads: on a CPU.
    """
    moved = (centroids.double() - before.double()).norm(dim=1)  # [K]
    score -= moved[nearest]
    slow = _slow_limit(moved, score - second)
    second += slow
    is_fast = moved > slow
    is_kept = ~is_fast[nearest] & (score - second > NEAR_TIE)
    kept = is_kept.nonzero()[:, 0]
    if is_fast.any():
        _, challenge, _ = _scan(features, kept, centroids[is_fast], num_threads)
        second[kept] = second[kept].maximum(challenge.double())
        is_kept &= score - second > NEAR_TIE
    rest = (~is_kept).nonzero()[:, 0]
    found = assign(features, centroids, rest, num_threads=num_threads)
    nearest[rest], score[rest], second[rest] = found


def _slow_limit(moved: Tensor, lead: Tensor) -> float:
    """The limit of what is slow for which the fewest scores are to be computed."""

    levels = torch.linspace(0, 1, LIMITS, dtype=moved.dtype, device=moved.device)
    limits = moved.quantile(levels)  # [LIMITS]
    above = [(x > limit).sum() for limit in limits for x in (lead, moved)]
    counts = torch.stack(above).view(-1, 2).tolist()  # read at once: a GPU is waited for once

    def num_scores(choice: int) -> int:
        num_kept, num_fast = counts[choice]
        return num_kept * num_fast + (len(lead) - num_kept) * len(moved)

    return limits[min(range(LIMITS), key=num_scores)].item()


def _scan(
    features: Tensor, index: Tensor, centroids: Tensor, num_threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows `index` [M]: column of the highest score [M] int64, it and the second [M] float32."""
    if features.is_cpu:
        return _scan_on_cpu(features, index, centroids, num_threads)
    nearest = torch.empty_like(index)
    highest, second = features.new_empty(2, len(index))
    for start in range(0, len(index), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        scores = features[index[chunk]] @ centroids.T  # [n, K]
        highest[chunk], nearest[chunk] = scores.max(dim=1)
        second[chunk] = scores.scatter_(1, nearest[chunk, None], -torch.inf).amax(dim=1)
    return nearest, highest, second


def _scan_on_cpu(
    features: Tensor, index: Tensor, centroids: Tensor, num_threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`_scan` by NumPy, each thread with chunks of its own.

    On an AMD processor with AVX-512, NumPy's product takes half the time of torch's and its argmax
    a tenth.
    """
    rows, which, columns = features.numpy(), index.numpy(), centroids.numpy().T
    nearest = np.empty(len(which), np.int64)
    highest, second = np.empty((2, len(which)), np.float32)
    chunk_rows = max(1, CPU_TILE // len(centroids))
    starts = iter(range(0, len(which), chunk_rows))

    def scan_chunks() -> None:
        tile = np.empty((chunk_rows, len(centroids)), np.float32)  # fresh memory is slow
        for start in starts:  # of all threads: each takes the next
            chunk = slice(start, start + chunk_rows)
            some = rows[which[chunk]]  # [n, D]
            scores = np.matmul(some, columns, out=tile[: len(some)])  # [n, K]
            row = np.arange(len(some))
            best = nearest[chunk] = scores.argmax(axis=1)
            highest[chunk] = scores[row, best]
            scores[row, best] = -np.inf
            second[chunk] = scores[row, scores.argmax(axis=1)]

    with _matrix_libraries().limit(limits=1), ThreadPoolExecutor(num_threads) as pool:
        for run in [pool.submit(scan_chunks) for _ in range(num_threads)]:
            run.result()
    return torch.from_numpy(nearest), torch.from_numpy(highest), torch.from_numpy(second)


@cache
def _matrix_libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _nearest_exactly(rows: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of rows [n, D] by scores in float64, the first among equals: [n] int64."""
    scores = rows.double() @ centroids.double().T  # [n, K]
    is_best = scores >= scores.amax(dim=1, keepdim=True) - EXACT_TIE
    column = torch.arange(len(centroids), device=rows.device)
    return torch.where(is_best, column, len(centroids)).amin(dim=1)


def add_rows(sums: Tensor, rows: Tensor, nearest: Tensor, sign: int) -> None:
    """Adds (sign 1) or takes away (-1) rows [N, D] at their centroids [N] int64, in place.

    `sums` [K, D + 1] int64 holds fixed-point sums, and in its last column the number of rows.
    """
    for some, at in zip(rows.split(SUM_ROWS), nearest.split(SUM_ROWS), strict=True):
        part = some.new_zeros(len(sums), some.shape[1], dtype=torch.float64)  # whole numbers
        for few, here in zip(some.split(CHUNK_ROWS), at.split(CHUNK_ROWS), strict=True):
            part.index_add_(0, here, (few * (sign * SUM_SCALE)).round_().double())
        sums[:, :-1] += part.long()
    sums[:, -1] += sign * torch.bincount(nearest, minlength=len(sums))


def _inertia(features: Tensor, nearest: Tensor, centroids: Tensor) -> Tensor:
    """[1] int64: fixed-point sum of this rank's squared distances."""
    inertia = torch.zeros(1, dtype=torch.int64, device=features.device)
    for rows, at in zip(features.split(CHUNK_ROWS), nearest.split(CHUNK_ROWS), strict=True):
        offset = rows.double() - centroids.index_select(0, at).double()  # [n, D]
        inertia += (offset.square_().sum(dim=1) * INERTIA_SCALE).round_().long().sum()
    return inertia


def _next_centroids(centroids: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Unit means [K, D] of totals [K, D + 1], and how many clusters were split.

    A cluster whose sum is zero keeps its place. The i-th empty one and the i-th largest one share
    the latter's centroid, tilted apart. All follows from the totals: ranks agree without talking.
    """
    means, counts = totals[:, :-1].double(), totals[:, -1]  # [K, D], [K]
    length = means.norm(dim=1, keepdim=True)
    moved = torch.where(length > 0, means / length.clamp(min=1), centroids.double())

    empty = counts == 0
    by_size = counts.argsort(descending=True, stable=True)
    donor = by_size[(empty.cumsum(0) - 1).clamp(min=0)]  # [K], meant for the empty ones
    splits = empty & (counts[donor] > 1)
    is_donor = torch.zeros_like(counts).index_add_(0, donor, splits.long()) > 0
    tilt = torch.ones(moved.shape[1], dtype=moved.dtype, device=moved.device)
    tilt[::2] += SPLIT_TILT
    tilt[1::2] -= SPLIT_TILT
    moved = torch.where(splits[:, None], moved[donor] * tilt, moved)
    moved = torch.where(is_donor[:, None], moved * (2 - tilt), moved)
    return F.normalize(moved).float(), splits.sum()
