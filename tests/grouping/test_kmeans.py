"""Spherical k-means: the same bits however the rows are spread."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog.errors import UserError
from scale_smog.grouping import spherical_kmeans
from scale_smog.grouping.kmeans import INERTIA_SCALE, SPLIT_TILT, SUM_SCALE, assign, reassign

NUM_GROUPS, DIM = 40, 16


def unit_rows(num: int, seed: int, dim: int = DIM) -> torch.Tensor:
    """Rows around a few directions, some of them twice: there are exact ties."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num // 20 + 1, dim, generator=generator)
    rows = centres.repeat(20, 1)[:num] + 0.4 * torch.randn(num, dim, generator=generator)
    rows[: num // 10] = rows[num // 2 : num // 2 + num // 10]
    return F.normalize(rows)


def numpy_lloyd(features, centroids, iterations):
    """The same algorithm, written plainly in NumPy with every score in float64."""
    x = features.numpy()
    fixed = np.round(x.astype(np.float64) * SUM_SCALE).astype(np.int64)
    c = F.normalize(centroids).numpy()
    for iteration in range(iterations + 1):
        nearest = np.argmax(x.astype(np.float64) @ c.astype(np.float64).T, axis=1)
        counts = np.bincount(nearest, minlength=len(c))
        distance = np.square(x.astype(np.float64) - c[nearest].astype(np.float64)).sum(1)
        if iteration == iterations:
            inertia = np.round(distance * INERTIA_SCALE).astype(np.int64).sum() / INERTIA_SCALE
            return c, nearest, counts, inertia
        new = c.astype(np.float64).copy()
        for k in range(len(c)):
            total = fixed[nearest == k].sum(0).astype(np.float64)
            if counts[k] and np.linalg.norm(total) > 0:
                new[k] = total / np.linalg.norm(total)
        empty, by_size = np.flatnonzero(counts == 0), np.argsort(-counts, kind="stable")
        tilt = np.where(np.arange(c.shape[1]) % 2 == 0, 1 + SPLIT_TILT, 1 - SPLIT_TILT)
        for i, k in enumerate(empty):
            donor = by_size[i]
            if counts[donor] > 1:
                new[k] = new[donor] * tilt
                new[donor] = new[donor] * (2 - tilt)
        c = (new / np.linalg.norm(new, axis=1, keepdims=True)).astype(np.float32)


def cluster_slice(features, centroids, iterations, cuts):
    """On rank r: the rows between cut r and cut r + 1."""
    rank = torch.distributed.get_rank()
    mine = features[cuts[rank] : cuts[rank + 1]]
    result = spherical_kmeans(mine, centroids, iterations=iterations)
    return result.centroids, result.assignments, result.counts, result.inertia


@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
def test_it_equals_a_plain_numpy_lloyd_at_every_iteration(iterations):
    features, start = unit_rows(3000, 0), unit_rows(NUM_GROUPS, 1)
    result = spherical_kmeans(features, start, iterations=iterations)
    centroids, nearest, counts, inertia = numpy_lloyd(features, start, iterations)
    assert (result.centroids.numpy() == centroids).all()
    assert (result.assignments.numpy() == nearest).all()
    assert (result.counts.numpy() == counts).all()
    assert result.inertia == inertia


@pytest.mark.parametrize(
    "cuts", [(0, 1500, 3000), (0, 1, 3000), (0, 900, 900, 3000), (0, 0, 700, 2999, 3000)]
)
def test_ragged_and_empty_slices_of_any_number_of_ranks_give_the_same_bits(cuts):
    features, start = unit_rows(3000, 0), unit_rows(NUM_GROUPS, 1)
    alone = spherical_kmeans(features, start, iterations=5)
    ranks = run_on_ranks(len(cuts) - 1, cluster_slice, features, start, 5, cuts)
    for centroids, _, counts, inertia in ranks:
        assert torch.equal(centroids, alone.centroids)
        assert torch.equal(counts, alone.counts)
        assert inertia == alone.inertia
    assert torch.equal(torch.cat([r[1] for r in ranks]), alone.assignments)


def test_the_order_of_the_rows_does_not_matter():
    features, start = unit_rows(3000, 0), unit_rows(NUM_GROUPS, 1)
    alone = spherical_kmeans(features, start, iterations=5)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    shuffled = spherical_kmeans(features[order], start, iterations=5)
    assert torch.equal(shuffled.centroids, alone.centroids)
    assert torch.equal(shuffled.assignments, alone.assignments[order])


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 0.1])
def test_rows_that_are_not_compared_anew_stay_where_they_belong(distance):
    """Some centroids move far and some not at all, five times: the bounds wear out."""
    features, generator = unit_rows(2000, seed=5), torch.Generator().manual_seed(6)
    centroids = features[:NUM_GROUPS].clone()
    nearest, score, second = assign(features, centroids)
    for _ in range(5):
        speed = distance * torch.rand(NUM_GROUPS, 1, generator=generator) ** 4
        direction = torch.randn(NUM_GROUPS, DIM, generator=generator)
        before, centroids = centroids, F.normalize(centroids + speed * direction)
        reassign(nearest, score, second, features, before, centroids)
        scores = features.double() @ centroids.double().T
        assert torch.equal(nearest, assign(features, centroids)[0])
        best, other = scores.topk(2, dim=1).values.T
        assert (score <= best + 1e-6).all() and (second >= other - 1e-6).all()


def test_scikit_learn_driven_one_iteration_at_a_time_agrees():
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    features = unit_rows(10_000, 0, dim=32)
    start = features[1000:5000:20]  # no row twice
    x, centres = features.numpy(), start.numpy()
    for iteration in range(10):
        ours = spherical_kmeans(features, start, iterations=iteration)
        assert (ours.counts > 0).all()  # scikit-learn fills empty clusters in its own way
        labels = pairwise_distances_argmin(x, centres)
        inertia = np.square(x - centres[labels]).sum()
        assert abs(ours.inertia - inertia) < 1e-5 * inertia
        assert (labels == ours.assignments.numpy()).mean() >= 0.9999
        step = KMeans(len(centres), init=centres, n_init=1, max_iter=1).fit(x)
        centres = F.normalize(torch.from_numpy(step.cluster_centers_)).numpy()


def test_from_its_own_start_faiss_finds_nothing_better():
    import faiss

    features, excess = unit_rows(10_000, 0), []
    for seed in range(5):
        kmeans = faiss.Kmeans(
            DIM, 100, niter=15, spherical=True, seed=seed, max_points_per_centroid=10**9
        )
        kmeans.train(features.numpy())
        theirs = 2 * (len(features) - kmeans.index.search(features.numpy(), 1)[0].sum())
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        ours = spherical_kmeans(features, features[order[:100]], iterations=15)
        excess.append(ours.inertia / theirs - 1)
    assert abs(np.mean(excess)) <= 0.005 and max(excess) <= 0.01, excess


def test_of_equal_centroids_the_lowest_index_wins():
    features = unit_rows(500, 0)
    start = unit_rows(6, 1)[[0, 1, 1, 2, 2, 2]]
    result = spherical_kmeans(features, start, iterations=0)
    assert set(result.assignments.tolist()) <= {0, 1, 3}


def test_empty_groups_split_the_largest():
    features = unit_rows(2000, 0)
    start = features[:1].repeat(NUM_GROUPS, 1)  # all but one start empty
    result = spherical_kmeans(features, start, iterations=12)
    assert result.num_splits > 0 and (result.counts > 0).all()


def test_a_group_of_one_row_is_not_split():
    """An empty group takes half of a group only where there are two rows to share."""
    rows, away = torch.eye(4)[:2], -torch.eye(4)[2:3]
    start = torch.cat([rows, away])  # the third group is empty; both others hold one row
    result = spherical_kmeans(rows, start, iterations=1)
    assert result.num_splits == 0 and result.counts.tolist() == [1, 1, 0]
    assert torch.equal(result.centroids, start)


def test_more_groups_than_distinct_rows_is_survived():
    features = unit_rows(3, 0).repeat(10, 1)
    result = spherical_kmeans(features, unit_rows(8, 1), iterations=5)
    assert result.centroids.isfinite().all() and result.counts.sum() == 30
    assert result.inertia < 1e-3


def test_each_iteration_lowers_the_inertia():
    features, start = unit_rows(3000, 0), unit_rows(3000, 0)[:NUM_GROUPS]
    inertias = [spherical_kmeans(features, start, iterations=i).inertia for i in range(6)]
    assert all(after <= before for before, after in itertools.pairwise(inertias))
    assert inertias[-1] < 0.9 * inertias[0]


def test_rows_of_zeros_go_to_the_first_group_and_do_not_move_it():
    features, start = unit_rows(500, 0), unit_rows(8, 1)
    with_zeros = torch.cat([features, torch.zeros(5, DIM)])
    alone = spherical_kmeans(features, start, iterations=4)
    result = spherical_kmeans(with_zeros, start, iterations=4)
    assert torch.equal(result.centroids, alone.centroids)
    assert (result.assignments[500:] == 0).all()


@pytest.mark.parametrize("num_groups", [1, 31, 33, 127])
def test_any_number_of_groups_is_exact(num_groups):
    features, start = unit_rows(2500, 0), unit_rows(num_groups, 1)
    result = spherical_kmeans(features, start, iterations=2)
    centroids, nearest, _, _ = numpy_lloyd(features, start, 2)
    assert (result.centroids.numpy() == centroids).all()
    assert (result.assignments.numpy() == nearest).all()


def test_no_table_of_all_scores_is_made():
    """Nor anything else that grows like N x K: 100 MB here; a chunk's scores are 4 MB."""
    features, start = unit_rows(50_000, 0), unit_rows(512, 1)
    spherical_kmeans(features[:4096], start, iterations=1)  # libraries take their own memory
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory_kib("VmRSS")
    spherical_kmeans(features, start, iterations=2)
    assert memory_kib("VmHWM") - before < 32 * 1024


def memory_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def test_rows_that_cancel_keep_their_centroid():
    row = unit_rows(1, 0)
    orthogonal = torch.zeros_like(row)
    orthogonal[0, 0], orthogonal[0, 1] = row[0, 1], -row[0, 0]
    result = spherical_kmeans(torch.cat([row, -row]), orthogonal, iterations=3)
    assert torch.allclose(result.centroids, F.normalize(orthogonal))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_with_their_number(bad):
    features = unit_rows(100, 0)
    features[7, 3] = bad
    with pytest.raises(UserError, match="1 of 100 features are not finite"):
        spherical_kmeans(features, unit_rows(4, 1), iterations=1)


def test_no_rows_at_all_are_refused():
    with pytest.raises(UserError, match="no features"):
        spherical_kmeans(torch.zeros(0, DIM), unit_rows(4, 1), iterations=1)


def test_near_ties_are_decided_in_float64():
    """Centroids that float32 cannot tell apart; the order of its rounding must not decide."""
    base = unit_rows(1, 0)
    centroids = F.normalize(base + 2e-7 * torch.randn(64, base.shape[1]))
    rows = F.normalize(base + 0.3 * unit_rows(300, 1))
    found = spherical_kmeans(rows, centroids, iterations=0).assignments
    scores = rows.double() @ F.normalize(centroids).double().T  # [N, K]
    lead = scores.topk(2, dim=1).values.diff().abs()[:, 0]
    clear = lead > 1e-11
    assert torch.equal(found[clear], scores.argmax(dim=1)[clear]) and clear.sum() > 200
    assert (rows @ F.normalize(centroids).T).argmax(dim=1)[clear].ne(found[clear]).any()
