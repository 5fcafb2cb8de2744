"""SwAV: a view's code is predicted from the image's other views (Caron et al., NeurIPS 2020).

Behind the projector, which has no batch norm at its end, are K trained prototypes. There is no
momentum net. Codes are assignments to the prototypes, balanced over the global batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.grouping import FeatureBank, chance_loss
from scale_smog.methods.base import GroupMethod, StepReport
from scale_smog.models.heads import Prototypes
from scale_smog.schedules import ScheduledValues

SINKHORN_ROUNDS = 3  # section 3.1
PROTOTYPES = "predictor.weight"  # of the online net


class Swav(GroupMethod):
    """Prototypes that are trained, and a queue of features where the batch is small beside them."""

    title = "SwAV (Caron et al., NeurIPS 2020)"

    def __init__(self, recipe: Recipe, engine: Engine, batch: int, num_images: int):
        super().__init__(recipe, engine, batch, num_images)
        self.config, self.num_prototypes = recipe.method, recipe.grouping.num_groups
        num_steps, dim = self.config.queue_steps, recipe.model.dim
        self.queue = FeatureBank(num_steps, batch, 2 * dim, engine.device)  # both large views'
        self.parts["queue"] = self.queue

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step (section 3.1); small views are predicted from, and have no code (3.2)."""
        engine, config = self.engine, self.config
        prototypes = engine.online.predictor
        assert isinstance(prototypes, Prototypes)
        prototypes.are_frozen = scheduled.epoch <= config.frozen_epochs
        first, second = batch.large
        _, p = engine.forward_online(first, [second, *batch.small])
        scores, z = p.split([self.num_prototypes, self.recipe.model.dim], dim=-1)
        # scores [V, B, K], z [V, B, D]; the first two views are the large ones
        queued = self.queued_scores() if scheduled.epoch > config.queue_after_epochs else []
        codes = sinkhorn(torch.cat([*queued, scores[:2].detach()], dim=1), config.epsilon)
        codes = codes[:, -len(first) :]  # [2, B, K]
        loss = swapped_prediction_loss(scores, codes, self.recipe.grouping.temperature)
        engine.backward(loss)
        is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
        if is_applied:
            self.count(codes[0].argmax(dim=1))
            if config.queue_steps:
                self.queue.push(torch.cat([z[0], z[1]], dim=1))
        return StepReport(loss, is_applied, chance_loss(self.num_prototypes), usage=self.usage)

    @torch.no_grad()
    def queued_scores(self) -> list[Tensor]:
        """Similarities [2, N, K] of the queue's features with the prototypes of today, if any."""
        queue = self.queue.features()  # [N, 2 D]
        if not len(queue):
            return []
        z = queue.view(len(queue), 2, -1).transpose(0, 1)  # [2, N, D]
        prototypes = self.centroids()
        return [z.to(prototypes.dtype) @ prototypes.T]

    def centroids(self) -> Tensor:
        """The prototypes [K, D]."""
        return F.normalize(self.engine.whole_parameter(PROTOTYPES))


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Codes under which all prototypes have an equal share of the images (Eqs. 3 to 5).

    Rows and columns of exp(scores / epsilon) are normalised in turn (Cuturi, NeurIPS 2013), over
    the images of all ranks: one all-reduce a round.

    Args:
        scores: cosines [..., N, K] of this rank's images.
        epsilon: the smaller, the harder the codes.
        rounds: of the two normalisations.

    Returns:
        [..., N, K], rows add up to 1, or to 0 where epsilon is too small for the type.
    """
    codes = torch.exp((scores - 1) / epsilon)  # below 1: scores are cosines
    tiny = torch.finfo(codes.dtype).tiny  # a prototype far from all images may have a sum of 0
    for _ in range(rounds):
        codes /= distributed.all_reduce(codes.sum(dim=-2, keepdim=True)).clamp_min(tiny)
        codes /= codes.sum(dim=-1, keepdim=True).clamp_min(tiny)  # of an image
    return codes


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each large view's code with every other view's prediction (Eqs. 1 and 2).

    Args:
        scores: cosines [V, B, K] with the prototypes, large views first.
        codes: of the large views [2, B, K].
        temperature: tau.

    Returns:
        Mean over the images, the codes, and the V - 1 predictions of each.
    """
    log_p = F.log_softmax(scores / temperature, dim=-1)  # [V, B, K]
    num_codes, batch, _ = codes.shape
    crossed = -torch.einsum("ibk,vbk->iv", codes, log_p) / batch  # [2, V]
    others = crossed.sum() - crossed.diagonal().sum()
    return others / (num_codes * (len(scores) - 1))
