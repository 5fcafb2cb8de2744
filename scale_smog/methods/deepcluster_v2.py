"""DeepCluster v2: images are classified into k-means clusters of all images (Caron et al., 2020).

SwAV's paper (arXiv:2006.09882) describes it in its appendix. At the start of an epoch the features
that the last one left of every image are clustered; until the next the centroids stay, and are what
predictions are compared with. One set of clusters, of the first large view's features. There is
neither predictor nor momentum net.
"""

from collections.abc import Iterable

from torch import Tensor

from scale_smog import loss as losses
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.errors import UserError
from scale_smog.grouping import ImageClusters, chance_loss
from scale_smog.methods.base import GroupMethod, StepReport, first_features
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues


class DeepClusterV2(GroupMethod):
    """A feature and a cluster of every image."""

    title = "DeepCluster v2 (Caron et al., NeurIPS 2020)"

    def __init__(self, recipe: Recipe, engine: Engine, batch: int, num_images: int):
        super().__init__(recipe, engine, batch, num_images)
        grouping = recipe.grouping
        if grouping.num_groups > num_images:
            raise UserError(
                f"grouping.num_groups={grouping.num_groups} is more than the {num_images} images"
            )
        self.clusters = ImageClusters(
            grouping.num_groups, num_images, recipe.model.dim, recipe.run.seed, engine.device
        )
        self.parts["groups"] = self.clusters
        self.num_first_images = num_images

    def start(self, batches: Iterable[Batch]) -> None:
        """Features of all images by the initial net."""
        for batch, z in first_features(self.engine, batches):
            self.clusters.push(z, batch.sample_id.to(z.device))

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step, with new clusters where an epoch begins."""
        engine, clusters, grouping = self.engine, self.clusters, self.recipe.grouping
        if self.is_first_of_epoch(step):
            with phases.during(phases.KMEANS):
                clusters.find(grouping.kmeans_iterations, step)
        first, second = batch.large
        z, p = engine.forward_online(first, [second, *batch.small])  # [B, D], [V, B, D]
        ids = batch.sample_id.to(engine.device, non_blocking=True)  # [B], few: no wait
        target = clusters.of(ids)  # [B]
        centroids = clusters.centroids.to(engine.dtype)  # [K, D], without gradient
        loss = losses.group_contrastive_loss(p, centroids, target, grouping.temperature)
        engine.backward(loss)
        is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
        if is_applied:
            clusters.push(z, ids)
            self.count(target)
        return StepReport(loss, is_applied, chance_loss(grouping.num_groups), usage=self.usage)

    def is_first_of_epoch(self, step: int) -> bool:
        """Whether the step's batch is the first that begins in its epoch."""
        batch = self.recipe.data.global_batch
        return step * batch // self.num_images != (step - 1) * batch // self.num_images

    def centroids(self) -> Tensor:
        """The clusters' centroids [K, D]."""
        return self.clusters.centroids
