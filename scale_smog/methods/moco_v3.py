"""MoCo v3: each view against the momentum net's keys of all images (Chen et al., ICCV 2021).

Projector and predictor end with a batch norm. Keys are the batch's own: there is no queue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.grouping import chance_loss
from scale_smog.methods.base import Method, StepReport, cosine_ema
from scale_smog.schedules import ScheduledValues


class MocoV3(Method):
    """Queries of the online net, keys of the momentum net, in both directions."""

    title = "MoCo v3 (Chen et al., ICCV 2021)"

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step (Algorithm 1)."""
        engine, temperature = self.engine, self.recipe.method.temperature
        first, second = batch.large
        _, queries = engine.forward_online(first, [second])  # [2, B, D]
        keys = torch.stack([engine.forward_momentum(view) for view in (second, first)])
        loss = symmetrised_loss(queries, keys, temperature)
        engine.backward(loss)
        is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
        if is_applied:
            engine.update_ema(cosine_ema(self.recipe.model.ema, scheduled.progress))
        chance = 4 * temperature * chance_loss(keys.shape[1] * distributed.world_size())
        return StepReport(loss, is_applied, chance)


def symmetrised_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE (Eq. 1) of each view's query against its image's key among all images' keys.

    Args:
        queries: of each view [2, B, D], unit rows.
        keys: of the other view [2, B, D] by the momentum net, unit rows, without gradient.
        temperature: tau; the loss is scaled by 2 tau (Algorithm 1).

    Returns:
        Mean over this rank's images, the two directions added up.
    """
    batch = queries.shape[1]
    gathered = distributed.differentiable_all_gather(keys).transpose(0, 1)  # [2, W, B, D]
    logits = queries @ gathered.flatten(1, 2).mT / temperature  # [2, B, W B]
    own = distributed.rank() * batch + torch.arange(batch, device=queries.device)  # [B]
    directions = [F.cross_entropy(each, own) for each in logits]
    return 2 * temperature * (directions[0] + directions[1])
