"""scale_smog: self-supervised pre-training of image backbones by SMoG, from one machine to many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scale_smog.errors import UserError

if TYPE_CHECKING:
    from scale_smog.config import Recipe
    from scale_smog.recipe import load_recipe

__all__ = ["Recipe", "UserError", "load_recipe"]

_PARTS = ("data", "evaluation", "grouping", "loss", "models", "optim")
_HOMES = {"Recipe": "config", "load_recipe": "recipe"}


def __getattr__(name: str) -> Any:
    """`scale_smog.models` and its like, imported when they are first asked for: torch is slow."""
    if name in _PARTS:
        return import_module(f"scale_smog.{name}")
    if name in _HOMES:
        return getattr(import_module(f"scale_smog.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'scale_smog' has no attribute '{name}'")
