"""The nets of SMoG: backbones, heads, synchronised batch norm, and the two nets made of them."""

from scale_smog.models.backbones import build_backbone, stages
from scale_smog.models.batch_norm import (
    average_statistics,
    process_group_for,
    synchronise_batch_norm,
    unshared_statistics,
    untracked,
)
from scale_smog.models.siamese import MomentumNet, OnlineNet, build_nets

__all__ = [
    "MomentumNet",
    "OnlineNet",
    "average_statistics",
    "build_backbone",
    "build_nets",
    "process_group_for",
    "stages",
    "synchronise_batch_norm",
    "unshared_statistics",
    "untracked",
]
