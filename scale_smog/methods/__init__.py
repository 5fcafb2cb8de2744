"""What a net is trained for: one file a method, recognisable to a reader of its paper."""

from scale_smog.config import Recipe
from scale_smog.engine import Engine
from scale_smog.methods.base import GroupMethod, Method, StepReport
from scale_smog.methods.byol import Byol
from scale_smog.methods.deepcluster_v2 import DeepClusterV2
from scale_smog.methods.moco_v3 import MocoV3
from scale_smog.methods.simclr import SimClr
from scale_smog.methods.smog import Smog
from scale_smog.methods.swav import Swav

__all__ = ["METHODS", "GroupMethod", "Method", "StepReport", "build_method"]

METHODS: dict[str, type[Method]] = {
    "smog": Smog,
    "swav": Swav,
    "deepcluster_v2": DeepClusterV2,
    "simclr": SimClr,
    "moco_v3": MocoV3,
    "byol": Byol,
}


def build_method(recipe: Recipe, engine: Engine, batch: int, num_images: int) -> Method:
    """The recipe's method, as it begins; the arguments are `Method`'s."""
    return METHODS[recipe.method.name](recipe, engine, batch, num_images)
