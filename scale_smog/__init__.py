"""scale_smog: large-scale group-contrastive pre-training, from tar shards to wide backbones."""

from importlib import import_module
from types import ModuleType

from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.recipe import load_recipe

__all__ = ["Recipe", "UserError", "load_recipe"]

_ON_DEMAND = ("data", "evaluation", "grouping", "loss", "models", "optim")


def __getattr__(name: str) -> ModuleType:
    """`scale_smog.models` and its like, imported when they are first asked for: torch is slow."""
    if name in _ON_DEMAND:
        return import_module(f"scale_smog.{name}")
    raise AttributeError(f"module 'scale_smog' has no attribute '{name}'")
