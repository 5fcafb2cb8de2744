"""Saves and loads what a run is, in pieces that any engine on any number of ranks can take."""

from scale_smog.checkpoint.manifest import generations, whole_or_why
from scale_smog.checkpoint.reading import load
from scale_smog.checkpoint.saving import Checkpoints, Restored

__all__ = ["Checkpoints", "Restored", "generations", "load", "whole_or_why"]
