"""What a trained net is worth."""

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
