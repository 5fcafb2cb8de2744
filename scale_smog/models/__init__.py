"""The nets of SMoG: backbones, heads, synchronised batch norm, and the two nets made of them."""

from scale_smog.models.backbones import build_backbone
from scale_smog.models.batch_norm import process_group_for, synchronise_batch_norm
from scale_smog.models.siamese import MomentumNet, OnlineNet, build_nets

__all__ = [
    "MomentumNet",
    "OnlineNet",
    "build_backbone",
    "build_nets",
    "process_group_for",
    "synchronise_batch_norm",
]
