"""BYOL: each view predicts the other's momentum projection (Grill et al., NeurIPS 2020).

The projector has no batch norm at its end; the online net alone has a predictor.
"""

import torch
from torch import Tensor

from scale_smog.data.batch import Batch
from scale_smog.methods.base import Method, StepReport, cosine_ema
from scale_smog.schedules import ScheduledValues

CHANCE_LOSS = 4.0  # of predictions at right angles to their targets, twice


class Byol(Method):
    """Two predictions, two targets, no negatives; nothing but the nets is kept."""

    title = "BYOL (Grill et al., NeurIPS 2020)"

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step (section 3.1)."""
        engine = self.engine
        first, second = batch.large
        _, p = engine.forward_online(first, [second])  # [2, B, D]
        targets = [engine.forward_momentum(view) for view in (second, first)]
        loss = regression_loss(p, torch.stack(targets))
        engine.backward(loss)
        is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
        if is_applied:
            engine.update_ema(cosine_ema(self.recipe.model.ema, scheduled.progress))
        return StepReport(loss, is_applied, CHANCE_LOSS)


def regression_loss(p: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of unit predictions from unit targets (Eq. 2), the two views added up.

    Args:
        p: of each view [2, B, D], unit rows.
        targets: projections [2, B, D] of the other view by the momentum net, unit rows.

    Returns:
        Mean over images: 0 to 8.
    """
    return (2 - 2 * (p * targets).sum(dim=-1)).mean(dim=1).sum()
