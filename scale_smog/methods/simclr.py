"""SimCLR: an image's two views against those of all other images (Chen et al., ICML 2020).

Behind the backbone is a projector alone. Every view is trained; there is no momentum net.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.grouping import chance_loss
from scale_smog.methods.base import Method, StepReport
from scale_smog.schedules import ScheduledValues


class SimClr(Method):
    """Images of the global batch against one another; nothing is kept from step to step."""

    title = "SimCLR (Chen et al., ICML 2020)"

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step (Algorithm 1)."""
        temperature = self.recipe.method.temperature
        _, report = contrast_images(self.engine, batch, scheduled, temperature)
        return report


def contrast_images(
    engine: Engine, batch: Batch, scheduled: ScheduledValues, temperature: float
) -> tuple[Tensor, StepReport]:
    """One step, with whatever heads the nets have.

    Returns:
        z [B, D] of the first view, and the step's report.
    """
    first, second = batch.large
    z, p = engine.forward_online(first, [second])  # [B, D], [2, B, D]
    loss = nt_xent_loss(p, temperature)
    engine.backward(loss)
    is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
    num_others = 2 * len(z) * distributed.world_size() - 1
    return z, StepReport(loss, is_applied, chance_loss(num_others))


def nt_xent_loss(p: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view against its image's other view among all views of the batch.

    NT-Xent (Eq. 1), over the global batch.

    Args:
        p: unit predictions [2, B, D] of this rank's images, float32 at least.
        temperature: tau.

    Returns:
        Mean over this rank's 2 B views.
    """
    batch = p.shape[1]
    gathered = distributed.differentiable_all_gather(p)  # [W, 2, B, D]
    first = distributed.rank() * 2 * batch  # row of this rank's first view among W 2 B
    own = torch.arange(2 * batch, device=p.device)
    logits = p.flatten(0, 1) @ gathered.flatten(0, 2).T / temperature  # [2B, W 2B]
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[own, first + own] = True
    logits = logits.masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, first + own.roll(batch))
