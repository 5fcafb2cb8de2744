"""Spherical k-means over features spread over ranks, the same to the bit at any number of ranks.

Sums are 64-bit integers, so their order does not matter; near ties of a float32 assignment are
decided in float64, so it does not matter either which kernel or chunk a row went through.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from scale_smog.distributed import all_reduce
from scale_smog.errors import UserError

CHUNK_ROWS = 2048  # a [2048, 3000] float32 tile of scores fits an H200's second-level cache
SUM_SCALE = 2.0**40  # fixed point of sums: exact for 8.4 M unit rows in one cluster
INERTIA_SCALE = 2.0**36  # a row adds at most 4
NEAR_TIE = 1e-6  # well above the rounding of a float32 dot product of unit vectors
SPLIT_TILT = 1 / 1024


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and what belongs to them; N rows on this rank, K centroids."""

    centroids: Tensor  # [K, D] float32, unit rows
    assignments: Tensor  # [N] int64, of this rank's rows
    counts: Tensor  # [K] int64, over all ranks
    inertia: float  # sum of |x - c|^2 over all ranks
    num_splits: int  # empty clusters that took half of a large one, over all iterations


def spherical_kmeans(
    features: Tensor,
    centroids: Tensor,
    *,
    iterations: int,
    process_group: dist.ProcessGroup | None = None,
) -> KMeansResult:
    """Exactly `iterations` rounds of Lloyd's algorithm on the unit sphere.

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
    features, centroids = (
        features.detach().float(),
        functional.normalize(centroids.detach().float()),
    )
    _check_rows(features, process_group)
    num_splits = torch.zeros((), dtype=torch.int64, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        for _ in range(iterations):
            sums, counts, _, _ = _assign_and_sum(features, centroids, process_group)
            centroids, splits = _next_centroids(centroids, sums, counts)
            num_splits += splits
        _, counts, inertia, assignments = _assign_and_sum(features, centroids, process_group)
    return KMeansResult(centroids, assignments, counts, inertia, int(num_splits))


def _check_rows(features: Tensor, group: dist.ProcessGroup | None) -> None:
    bad = (~features.isfinite()).any(dim=1).sum()
    facts = all_reduce(torch.stack([bad, bad.new_tensor(len(features))]), group).tolist()
    if facts[0]:
        raise UserError(f"k-means: {facts[0]} of {facts[1]} features are not finite")
    if not facts[1]:
        raise UserError("k-means: no features to cluster")


def _assign_and_sum(
    features: Tensor, centroids: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Assignments of this rank's rows and, in one all-reduce, everybody's fixed-point totals.

    Returns:
        sums [K, D] int64, counts [K] int64, inertia, assignments [N] int64.
    """
    num_groups, dim = centroids.shape
    totals = torch.zeros(num_groups, dim + 2, dtype=torch.int64, device=features.device)
    assignments = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for start in range(0, len(features), CHUNK_ROWS):
        rows = features[start : start + CHUNK_ROWS]  # [n, D]
        nearest = assign(rows, centroids)  # [n]
        assignments[start : start + CHUNK_ROWS] = nearest
        distance = (rows.double() - centroids[nearest].double()).square().sum(1)  # [n]
        fixed = torch.empty(len(rows), dim + 2, dtype=torch.int64, device=features.device)
        fixed[:, :dim] = (rows.double() * SUM_SCALE).round_()
        fixed[:, dim] = 1
        fixed[:, dim + 1] = (distance * INERTIA_SCALE).round_()
        totals.index_add_(0, nearest, fixed)
    all_reduce(totals, group)
    inertia = totals[:, dim + 1].sum().item() / INERTIA_SCALE
    return totals[:, :dim], totals[:, dim], inertia, assignments


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid [n] int64 of unit rows [n, D], lowest index among equals.

    Matrix products have one constant shape whatever n is: a library may take another kernel, and
    round differently, for another shape.
    """
    num_rows = len(rows)
    padded = functional.pad(rows, (0, 0, 0, CHUNK_ROWS - num_rows))  # [CHUNK_ROWS, D]
    scores = (padded @ centroids.T)[:num_rows]  # [n, K]
    best, nearest = scores.max(dim=1)  # [n]
    is_close = scores >= (best - NEAR_TIE)[:, None]  # [n, K]
    tied = (is_close.sum(dim=1) > 1).nonzero()[:, 0]
    if len(tied):
        nearest[tied] = _nearest_exactly(rows[tied], centroids, is_close[tied])
    return nearest


def _nearest_exactly(rows: Tensor, centroids: Tensor, candidates: Tensor) -> Tensor:
    """Nearest of each row's candidates in float64: rows [m, D], candidates [m, K] bool -> [m]."""
    row, column = candidates.nonzero(as_tuple=True)  # the pairs to score, by row then by column
    exact = (rows[row].double() * centroids[column].double()).sum(1)
    best = exact.new_full((len(rows),), -torch.inf).scatter_reduce_(0, row, exact, "amax")
    column = torch.where(exact == best[row], column, len(centroids))
    return column.new_full((len(rows),), len(centroids)).scatter_reduce_(0, row, column, "amin")


def _next_centroids(centroids: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit means [K, D]; what has none keeps its place or splits the largest. Also: how many did.

    The i-th empty cluster and the i-th largest one share the latter's centroid, tilted apart.
    Everything follows from the counts, so ranks agree without talking.
    """
    means = sums.double()  # [K, D]
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
    return functional.normalize(moved).float(), splits.sum()
