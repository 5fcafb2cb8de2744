"""Spherical k-means against faiss and scikit-learn: the same start, ten updates, then the labels.

Three sizes, on a quiet machine and beside a process that keeps one core busy. faiss's and
scikit-learn's sums are float32 and change with the number of threads; ours are exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import torch
import torch.nn.functional as F
from compare import claim, interleaved, parse_arguments
from sklearn.cluster import KMeans
from torch import Tensor

from scale_smog.grouping import spherical_kmeans
from scale_smog.grouping.kmeans import add_rows, assign

ITERATIONS = 10
NO_SUBSAMPLE = 10**9


def make_features(num: int, num_groups: int, dim: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters on the unit sphere [num, dim], and rows of them to start from."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_groups, dim, generator=generator)
    noise = torch.randn(num, dim, generator=generator)
    which = torch.randint(num_groups, (num,), generator=generator)
    features = F.normalize(centres[which] + noise)
    return features, features[torch.randperm(num, generator=generator)[:num_groups]].clone()


def train_faiss(features: Tensor, start: Tensor) -> faiss.Kmeans:
    kmeans = faiss.Kmeans(
        features.shape[1],
        len(start),
        niter=ITERATIONS,
        spherical=True,
        max_points_per_centroid=NO_SUBSAMPLE,
        min_points_per_centroid=1,
    )
    kmeans.train(features.numpy(), init_centroids=start.numpy())
    return kmeans


def train_sklearn(features: Tensor, start: Tensor) -> KMeans:
    options: dict[str, Any] = {"init": start.numpy(), "n_init": 1}  # documented, not annotated
    return KMeans(len(start), max_iter=ITERATIONS, tol=0, **options).fit(features.numpy())


def sum_exactly(features: Tensor, nearest: Tensor, num_groups: int) -> Tensor:
    """Fixed-point sums and counts, as every iteration takes them."""
    sums = torch.zeros(num_groups, features.shape[1] + 1, dtype=torch.int64)
    add_rows(sums, features, nearest, 1)
    return sums


def sum_in_a_loop(features: Tensor, nearest: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sums and counts by a loop over groups, each with its list of rows."""
    counts = torch.bincount(nearest, minlength=num_groups)
    sums = features.new_zeros(num_groups, features.shape[1])
    for group, rows in enumerate(nearest.argsort().split(counts.tolist())):
        if len(rows):
            sums[group] = features[rows].sum(dim=0)
    return sums, counts


def extra_memory_mib(num: int, num_groups: int, dim: int, threads: int) -> float:
    """Peak memory of one call beyond what the features hold, in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (num, num_groups, dim, threads))


def _measure_memory(num: int, num_groups: int, dim: int, threads: int) -> float:
    torch.set_num_threads(threads)
    features, start = make_features(num, num_groups, dim)
    spherical_kmeans(features[:4096], start, iterations=1)  # libraries take their own buffers
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _memory_mib("VmRSS")
    spherical_kmeans(features, start, iterations=ITERATIONS)
    return _memory_mib("VmHWM") - before


def _memory_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that keeps a core busy meanwhile."""
    process = get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass


def compare(num: int, num_groups: int, dim: int, threads: int, rounds: int) -> None:
    """The claims of one size, quiet and disturbed."""
    features, start = make_features(num, num_groups, dim)
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: spherical_kmeans(features, start, iterations=ITERATIONS),
        "faiss, with the final labels": lambda: train_faiss(features, start).index.search(
            features.numpy(), 1
        ),
        "faiss, centroids only": lambda: train_faiss(features, start),
        "scikit-learn": lambda: train_sklearn(features, start),
    }
    for where, surroundings in (("quiet", nullcontext), ("busy neighbour", busy_neighbour)):
        size = f"{num} x {dim}, K = {num_groups}, {ITERATIONS} updates, {threads} threads, {where}"
        print(size)
        with surroundings():
            seconds = interleaved(jobs, rounds)
        for peer in list(jobs)[1:]:
            claim(f"k-means, s, against {peer}; {size}", seconds["ours"], seconds[peer])


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    sizes = [(100_000, 1000, 128), (100_000, 300, 256), (100_000, 3000, 128)]
    for size in [(10_000, 100, 128)] if arguments.quick else sizes:
        compare(*size, arguments.threads, arguments.repeats)

    num, num_groups, dim = (10_000, 100, 128) if arguments.quick else sizes[0]
    features, start = make_features(num, num_groups, dim)
    nearest, *_ = assign(features, start)
    print("the update alone, assignments given")
    update = interleaved(
        {
            "ours": lambda: sum_exactly(features, nearest, num_groups),
            "a loop over groups": lambda: sum_in_a_loop(features, nearest, num_groups),
        },
        arguments.repeats,
    )
    memory = extra_memory_mib(num, num_groups, dim, arguments.threads)
    print(f"  peak extra memory {memory:.1f} MiB")
    claim("k-means' update alone, s", update["ours"], update["a loop over groups"])
    claim("k-means' extra memory, MiB, against 64", memory, 64.0)


if __name__ == "__main__":
    main()
