"""The cluster of every image of a dataset, by k-means of the features last seen of it."""

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.distributed import Partition
from scale_smog.grouping.draws import draw_distinct, gather_rows
from scale_smog.grouping.kmeans import spherical_kmeans


class ImageClusters:
    """A feature of each image, each rank keeping those of a range of ids, and all images' clusters.

    Args:
        num_groups: K.
        num_images: N.
        dim: D.
        seed: of the features that a k-means begins with.
        device: where it lives.
    """

    centroids: Tensor  # [K, D] float32, unit rows

    def __init__(self, num_groups: int, num_images: int, dim: int, seed: int, device: torch.device):
        rank, ranks = distributed.rank(), distributed.world_size()
        self._first, end = rank * num_images // ranks, (rank + 1) * num_images // ranks
        self._num_own, self._seed = end - self._first, seed
        # [n + 1, D] float32; the row behind this rank's images takes what is other ranks'.
        self._features = torch.zeros(self._num_own + 1, dim, device=device)
        self._ids = torch.zeros(num_images, dtype=torch.int64, device=device)  # [N], of clusters
        self.centroids = torch.zeros(num_groups, dim, device=device)

    @torch.no_grad()
    def push(self, z: Tensor, sample_id: Tensor) -> None:
        """Keeps features [B, D] of the images [B] int64, on the same device; a collective."""
        z = _of_all_ranks(z)  # [W B, D]
        ids = _of_all_ranks(sample_id)  # [W B]
        order = ids.argsort(stable=True)
        comes_again = torch.zeros_like(ids, dtype=torch.bool)  # later in the batch: epochs meet
        comes_again[order[:-1]] = ids[order[:-1]] == ids[order[1:]]
        row = ids - self._first
        is_kept = (row >= 0) & (row < self._num_own) & ~comes_again
        self._features[torch.where(is_kept, row, self._num_own)] = z.float()

    def of(self, sample_id: Tensor) -> Tensor:
        """The clusters [B] of images [B]."""
        return self._ids[sample_id]

    @torch.no_grad()
    def find(self, iterations: int, draw: int) -> None:
        """Clusters all images anew, from features of K images; a collective.

        Args:
            iterations: of k-means.
            draw: a number that tells apart the times at which images are drawn.
        """
        features = self._features[: self._num_own]
        num, num_images = len(self.centroids), len(self._ids)
        row = draw_distinct(num, num_images, self._seed, draw, features.device) - self._first  # [K]
        is_own = (row >= 0) & (row < self._num_own)
        seeds = gather_rows(self._features, row, is_own)
        result = spherical_kmeans(features, seeds, iterations=iterations)
        self.centroids.copy_(result.centroids)
        self._ids.zero_()
        self._ids[self._first : self._first + self._num_own] = result.assignments
        distributed.all_reduce(self._ids)

    def state_dict(self) -> dict[str, Partition]:
        """Features [N, D] of all images, their clusters [N] and the centroids."""
        features = self._features[: self._num_own]  # [n, D]
        num_images, dim = len(self._ids), features.shape[1]
        shape = torch.Size([num_images, dim])
        return {
            "features": Partition(features, self._first * dim, shape, is_replicated=False),
            "ids": Partition.replicated(self._ids),
            "centroids": Partition.replicated(self.centroids),
        }

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Takes this rank's values of `state_dict`."""
        self._features[: self._num_own] = values["features"].to(self._features.device)
        self._ids.copy_(values["ids"])
        self.centroids.copy_(values["centroids"])


def _of_all_ranks(x: Tensor) -> Tensor:
    """Rows of all ranks [W B, ...], in rank order."""
    return distributed.differentiable_all_gather(x.detach()).flatten(0, 1)
