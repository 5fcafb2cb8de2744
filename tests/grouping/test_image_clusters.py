"""A feature and a cluster of every image, whatever rank has seen it."""

import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.grouping import ImageClusters, spherical_kmeans

NUM_IMAGES, NUM_GROUPS, DIM = 25, 4, 8  # no equal shares for two or three ranks
CPU = torch.device("cpu")


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(NUM_IMAGES, DIM, generator=generator), dim=-1)


def filled(num_rows: int = 6) -> ImageClusters:
    """All images in an order of its own, each rank seeing its part of every batch; some twice."""
    clusters = ImageClusters(NUM_GROUPS, NUM_IMAGES, DIM, seed=0, device=CPU)
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))
    order = torch.cat([order, order])[: -(-NUM_IMAGES // num_rows) * num_rows]
    size, z = num_rows // distributed.world_size(), features()
    for batch in order.split(num_rows):
        own = batch[distributed.rank() * size :][:size]
        clusters.push(z[own], own)
    return clusters


def clustered() -> dict[str, torch.Tensor]:
    clusters = filled()
    clusters.find(iterations=10, draw=0)
    return {"of": clusters.of(torch.arange(NUM_IMAGES)), "centroids": clusters.centroids}


def test_clusters_are_the_same_bits_on_any_number_of_ranks():
    alone = clustered()
    for num_ranks in (2, 3):
        for of_rank in run_on_ranks(num_ranks, clustered):
            assert all(torch.equal(of_rank[key], alone[key]) for key in alone)


def test_every_image_is_in_the_cluster_that_kmeans_finds_for_its_feature():
    found = clustered()
    again = spherical_kmeans(features(), found["centroids"], iterations=0)
    assert torch.equal(found["of"], again.assignments)
    assert len(found["of"].unique()) == NUM_GROUPS


def test_each_clustering_begins_with_features_of_other_images():
    clusters = filled()
    starts = []
    for draw in (0, 0, 1):
        clusters.find(iterations=0, draw=draw)
        starts.append(clusters.centroids.clone())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    assert all((features() @ row).max() > 1 - 1e-6 for row in starts[0])


def test_of_an_image_that_a_batch_has_twice_the_later_feature_stays():
    clusters = ImageClusters(2, 3, DIM, seed=0, device=CPU)
    z = features()[:3]
    clusters.push(z, torch.tensor([1, 0, 1]))
    kept = clusters.state_dict()["features"].values
    assert torch.equal(kept, torch.stack([z[1], z[2], torch.zeros(DIM)]))
