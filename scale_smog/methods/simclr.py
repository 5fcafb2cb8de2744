"""SimCLR: every image against all others of the batch (Chen et al., ICML 2020)."""

from torch import Tensor

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.grouping import chance_loss
from scale_smog.loss import instance_contrastive_loss
from scale_smog.methods.base import StepReport
from scale_smog.schedules import ScheduledValues


def contrast_images(
    engine: Engine, batch: Batch, scheduled: ScheduledValues
) -> tuple[Tensor, StepReport]:
    """One step: both views are trained (Eq. 1, over the global batch).

    Returns:
        z [B, D] of the first view, and the step's report.
    """
    first, second = batch.large
    z, p = engine.forward_online(first, [second])  # [B, D], [2, B, D]
    loss = instance_contrastive_loss(p)
    engine.backward(loss)
    is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
    num_others = 2 * len(z) * distributed.world_size() - 1
    return z, StepReport(loss, is_applied, chance_loss(num_others))
