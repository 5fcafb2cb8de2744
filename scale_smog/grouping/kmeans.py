"""Spherical k-means over features spread over ranks, the same to the bit at any number of ranks.

Sums are integers, so their order does not matter; near ties of a float32 assignment are decided
in float64, so it does not matter either which kernel or chunk a row went through.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scale_smog.distributed import all_reduce
from scale_smog.errors import UserError
from scale_smog.grouping.precision import full_float32
from scale_smog.runtime import phases

CHUNK_ROWS = 2048  # a [2048, 3000] float32 tile of scores fits an H200's second-level cache
LANES = 32  # columns that a vector instruction compares side by side
NEAR_TIE = 1e-6  # well above the rounding of a float32 dot product of unit vectors
EXACT_TIE = 1e-12  # the same for float64: closer scores are equal
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
    with full_float32(features.device):
        nearest = assign(features, centroids)
        add_rows(sums, features, nearest, 1)
        for _ in range(iterations):
            phases.check_for_stop()
            totals = all_reduce(sums.clone(), process_group)  # [K, D + 1]
            before, (centroids, splits) = centroids, _next_centroids(centroids, totals)
            if torch.equal(centroids, before):
                break  # the rounds that remain would change nothing
            num_splits += int(splits)
            left, nearest = nearest, assign(features, centroids)
            for moved in (left != nearest).nonzero()[:, 0].split(SUM_ROWS):
                rows = features.index_select(0, moved)
                add_rows(sums, rows, left[moved], -1)  # exact, so they can be mended
                add_rows(sums, rows, nearest[moved], 1)
    own = torch.cat([sums[:, -1], _inertia(features, nearest, centroids)])  # [K + 1]
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


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid [N] int64 of unit rows [N, D], the first among equals.

    Matrix products have one constant shape whatever N is: a library may take another kernel, and
    round differently, for another shape.
    """
    num_groups = len(centroids)
    columns = F.pad(centroids, (0, 0, 0, -num_groups % LANES)).T  # [D, C], C >= K
    scores = features.new_empty(CHUNK_ROWS, columns.shape[1])  # reused: fresh memory is slow
    nearest = torch.empty(len(features), dtype=torch.int64, device=features.device)
    is_tied = torch.empty(len(features), dtype=torch.bool, device=features.device)
    for start in range(0, len(features), CHUNK_ROWS):
        rows = features[start : start + CHUNK_ROWS]  # [n, D]
        num_rows = len(rows)
        if num_rows < CHUNK_ROWS:
            rows = F.pad(rows, (0, 0, 0, CHUNK_ROWS - num_rows))
        torch.mm(rows, columns, out=scores)  # [CHUNK_ROWS, C]
        scores[:, num_groups:] = -torch.inf
        best, lead = _best_and_lead(scores)
        nearest[start : start + num_rows] = best[:num_rows]
        is_tied[start : start + num_rows] = lead[:num_rows] <= NEAR_TIE
    for tied in is_tied.nonzero()[:, 0].split(EXACT_ROWS):
        nearest[tied] = _nearest_exactly(features[tied], centroids)
    return nearest


def _best_and_lead(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's highest score, and by how much it leads: [n, C] -> [n] int64, [n].

    In two rounds, the first over columns that share a lane: an argmax over whole rows takes three
    times as long on a CPU (2.8 ms against 0.9 ms for [2048, 1024], two threads).
    """
    by_lane = scores.view(len(scores), -1, LANES)  # [n, C / LANES, LANES]
    lane_best = by_lane.amax(dim=1)  # [n, LANES]
    best, lane = lane_best.max(dim=1)
    in_lane = by_lane[torch.arange(len(scores), device=scores.device), :, lane]  # [n, C / LANES]
    place = in_lane.argmax(dim=1)
    lane_best.scatter_(1, lane[:, None], -torch.inf)
    in_lane.scatter_(1, place[:, None], -torch.inf)
    second = torch.maximum(lane_best.amax(dim=1), in_lane.amax(dim=1))
    return place * LANES + lane, best - second


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
