"""The nets of SMoG: backbones, heads, synchronised batch norm, and the two nets made of them."""

from scale_smog.models.backbones import build_backbone, stages
from scale_smog.models.drop_path import draw_factors, dropped_as_now
from scale_smog.models.siamese import MomentumNet, OnlineNet, build_nets, sharding_units
from scale_smog.models.sync_batch_norm import (
    average_running_stats,
    frozen_running_stats,
    process_group_for,
    synchronise_batch_norm,
    unsynchronised_running_stats,
)

__all__ = [
    "MomentumNet",
    "OnlineNet",
    "average_running_stats",
    "build_backbone",
    "build_nets",
    "draw_factors",
    "dropped_as_now",
    "frozen_running_stats",
    "process_group_for",
    "sharding_units",
    "stages",
    "synchronise_batch_norm",
    "unsynchronised_running_stats",
]
