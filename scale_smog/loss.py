"""The group-contrastive loss (SMoG Eq. 3), and the instance-contrastive one before it (Eq. 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed

INSTANCE_TEMPERATURE = 0.2


def group_contrastive_loss(p: Tensor, groups: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each prediction against the group of the other view.

    Args:
        p: unit predictions [B, D] or [V, B, D].
        groups: updated groups [K, D], unit rows.
        ids: the momentum view's group [B] int64; every view of an image has the same target.
        temperature: tau.

    Returns:
        Mean over all views and images, float32 or float64 as `groups`.
    """
    logits = p.to(groups.dtype) @ groups.T / temperature  # [..., K]
    targets = ids.expand(logits.shape[:-1])  # [..., B]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def instance_contrastive_loss(p: Tensor, temperature: float = INSTANCE_TEMPERATURE) -> Tensor:
    """Cross-entropy of each view against its image's other view among all views of the batch.

    NT-Xent of SimCLR (Chen et al., ICML 2020, Eq. 1), over the global batch.

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
