"""What a trained net is worth.

What needs torch is imported when it is asked for: the protocols' settings are read without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scale_smog.evaluation.features import embed_images
    from scale_smog.evaluation.groups.quality import GroupQuality, group_quality
    from scale_smog.evaluation.knn import KnnProbe, knn_accuracy, knn_predict
    from scale_smog.evaluation.online import OnlineProbe

__all__ = [
    "GroupQuality",
    "KnnProbe",
    "OnlineProbe",
    "embed_images",
    "group_quality",
    "knn_accuracy",
    "knn_predict",
]

_HOMES = {
    "GroupQuality": "groups.quality",
    "KnnProbe": "knn",
    "OnlineProbe": "online",
    "embed_images": "features",
    "group_quality": "groups.quality",
    "knn_accuracy": "knn",
    "knn_predict": "knn",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"scale_smog.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'scale_smog.evaluation' has no attribute '{name}'")
