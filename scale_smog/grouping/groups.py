"""Groups that are updated in step with the nets (SMoG section 3.2)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import GroupingConfig
from scale_smog.counter_rng import RANDOM_SELECT, random_words
from scale_smog.errors import UserError
from scale_smog.grouping.draws import draw_distinct, gather_rows
from scale_smog.grouping.feature_bank import FeatureBank
from scale_smog.grouping.kmeans import KMeansResult, spherical_kmeans
from scale_smog.grouping.precision import full_float32

OPERATORS = ("momentum", "averaging", "adopt_latest", "random_select")


@dataclass(frozen=True)
class ResetReport:
    """What a reset did to the groups."""

    inertia: float  # per feature
    num_splits: int
    drift: float  # mean cosine distance between a group before and after


class MomentumGroups(nn.Module):
    """K unit vectors that follow the features assigned to them, over all ranks' batches.

    Args:
        num_groups: K.
        dim: D.
        operator: how a group follows its features (Table 7d): "momentum" (Eq. 4), "averaging",
            "adopt_latest", or "random_select".
        seed: of the random start and of "random_select".
        detach: the loss does not reach the features through the updated groups.
        kmeans_iterations: rounds of k-means at the start and at a reset.
    """

    centroids: Tensor  # [K, D], unit rows, float32 (float64 after .double())
    num_members: Tensor  # [K], features since the last reset, for "averaging"
    num_commits: Tensor  # [], for "random_select"
    counts: Tensor  # [K], features of the last update's global batch

    def __init__(
        self,
        num_groups: int,
        dim: int,
        operator: str = "momentum",
        *,
        seed: int = 0,
        detach: bool = False,
        kmeans_iterations: int = 10,
    ):
        super().__init__()
        if operator not in OPERATORS:
            raise ValueError(f"operator '{operator}' is none of {', '.join(OPERATORS)}")
        self.operator = operator
        self.seed = seed
        self.detach = detach
        self.kmeans_iterations = kmeans_iterations
        generator = torch.Generator().manual_seed(seed)
        start = F.normalize(torch.randn(num_groups, dim, generator=generator))
        self.register_buffer("centroids", start)
        self.register_buffer("num_members", torch.zeros(num_groups))
        self.register_buffer("num_commits", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_groups), persistent=False)

    @classmethod
    def from_config(cls, config: GroupingConfig, dim: int, seed: int) -> "MomentumGroups":
        """Random groups as the recipe's section describes them."""
        return cls(
            config.num_groups,
            dim,
            config.operator,
            seed=seed,
            detach=config.detach_groups,
            kmeans_iterations=config.kmeans_iterations,
        )

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        """Most similar group [B] int64 of features [B, D] (the argmax that Eq. 4 means)."""
        with full_float32(z.device):
            return (z @ self.centroids.T).argmax(dim=1)

    def updated_by(self, z: Tensor, beta: float) -> Tensor:
        """The groups after one update by the global batch, which `commit` makes the groups.

        G'_k = unit(beta G_k + (1 - beta) mean of the features assigned to k) (Eq. 4). Groups
        without features keep their value. One all-reduce, whose gradient is exact across ranks.

        Args:
            z: this rank's unit features [B, D], with their graph.
            beta: momentum of the groups.

        Returns:
            [K, D] unit rows, differentiable with respect to z.
        """
        z = z.detach() if self.detach else z
        with full_float32(z.device):
            sums, counts = self._global_sums(z)  # [K, D], [K]
            self.counts = counts
            if self.operator == "random_select":
                return F.normalize(self._random_rows(z))
            mean = sums / counts.clamp(min=1)[:, None]  # [K, D]
            if self.operator == "momentum":
                moved = beta * self.centroids + (1 - beta) * mean
            elif self.operator == "averaging":
                num_members = (self.num_members + counts).clamp(min=1)[:, None]
                moved = self.centroids + (mean - self.centroids) / num_members
            else:
                moved = mean
            return torch.where(counts[:, None] > 0, F.normalize(moved), self.centroids)

    @torch.no_grad()
    def commit(self, groups: Tensor) -> None:
        """Makes [K, D] the groups, after the optimizer step."""
        self.centroids.copy_(groups)
        self.num_members += self.counts
        self.num_commits += 1

    def start_from(self, bank: FeatureBank) -> KMeansResult:
        """First groups: k-means from features drawn by their global number.

        Raises:
            UserError: there are fewer features than groups.
        """
        features, num_groups = bank.features(), len(self.centroids)
        num_features = len(features) * distributed.world_size()
        if num_features < num_groups:
            raise UserError(
                f"{num_features} features for {num_groups} groups to begin with, as steps "
                "that were not finite left none: begin anew with more "
                "grouping.instance_warmup_steps or a lower optimizer.base_lr"
            )
        drawn = draw_distinct(num_groups, num_features, self.seed, 0, features.device)
        return self._cluster(features, gather_rows(features, *bank.own_rows(drawn)))

    def reseed_from(self, bank: FeatureBank) -> ResetReport:
        """Replaces the groups by k-means over the bank, started from the groups themselves."""
        before = self.centroids.clone()
        result = self._cluster(bank.features(), before)
        drift = 1 - (before * self.centroids).sum(1).mean().item()
        return ResetReport(result.inertia / int(result.counts.sum()), result.num_splits, drift)

    def _cluster(self, features: Tensor, seeds: Tensor) -> KMeansResult:
        result = spherical_kmeans(features, seeds, iterations=self.kmeans_iterations)
        self.centroids.copy_(result.centroids)
        self.num_members.zero_()
        return result

    def _global_sums(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Sum [K, D] and number [K] of the features assigned to each group, over all ranks."""
        ones = z.new_ones(len(z), 1)
        packed = z.new_zeros(len(self.centroids), z.shape[1] + 1)  # [K, D + 1]: one all-reduce
        packed = packed.index_add(0, self.assign(z), torch.cat([z, ones], dim=1))
        packed = distributed.differentiable_all_reduce(packed)
        return packed[:, :-1], packed[:, -1].detach()

    def _random_rows(self, z: Tensor) -> Tensor:
        """K features [K, D] drawn from the global batch by number, the same on every rank."""
        num_images = len(z) * distributed.world_size()
        ids, commit = np.arange(len(self.centroids)), int(self.num_commits)
        words = random_words(self.seed, ids, commit, RANDOM_SELECT, num_words=1)[:, 0]
        drawn = torch.from_numpy((words % np.uint64(num_images)).astype(np.int64))
        row = drawn.to(z.device) - distributed.rank() * len(z)  # [K]
        return gather_rows(z, row, is_own=(row >= 0) & (row < len(z)))


def chance_loss(num_choices: int) -> float:
    """The loss of a net that cannot tell its choices, such as groups, apart: ln K."""
    return math.log(num_choices)
