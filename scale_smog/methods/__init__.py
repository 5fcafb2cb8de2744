"""What a net is trained for: one file a method, recognisable to a reader of its paper."""

from scale_smog.config import Recipe
from scale_smog.engine import Engine
from scale_smog.methods.base import GroupMethod, Method, StepReport
from scale_smog.methods.smog import Smog

__all__ = ["GroupMethod", "Method", "StepReport", "build_method"]


def build_method(recipe: Recipe, engine: Engine, batch: int, num_images: int) -> Method:
    """The recipe's method, as it begins; the arguments are `Method`'s."""
    return Smog(recipe, engine, batch, num_images)
