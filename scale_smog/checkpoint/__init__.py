"""Saves and loads what a run is, in partitions that any engine on any number of ranks can take."""

from scale_smog.checkpoint.loading import load
from scale_smog.checkpoint.manifest import find_damage, list_checkpoints
from scale_smog.checkpoint.saving import Checkpoints, Restored

__all__ = ["Checkpoints", "Restored", "find_damage", "list_checkpoints", "load"]
