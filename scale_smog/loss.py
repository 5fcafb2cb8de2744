"""The group-contrastive loss (SMoG Eq. 3)."""

import torch.nn.functional as F
from torch import Tensor


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
