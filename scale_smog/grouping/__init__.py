"""The grouping module: synchronous momentum groups, their feature bank and their k-means reset."""

from scale_smog.grouping.feature_bank import FeatureBank
from scale_smog.grouping.groups import MomentumGroups, ResetReport, chance_loss
from scale_smog.grouping.image_clusters import ImageClusters
from scale_smog.grouping.kmeans import KMeansResult, spherical_kmeans
from scale_smog.grouping.usage import GroupUsage, perplexity

__all__ = [
    "FeatureBank",
    "GroupUsage",
    "ImageClusters",
    "KMeansResult",
    "MomentumGroups",
    "ResetReport",
    "chance_loss",
    "perplexity",
    "spherical_kmeans",
]
