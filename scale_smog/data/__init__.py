"""From tar shards to batches of views.

What needs torch is imported from its own module, so that the sharding tools start without it.
"""

from scale_smog.data.manifest import load_manifest, manifest_sha256
from scale_smog.data.plan import EpochPlan, SequentialPlan
from scale_smog.data.tar_dataset import TarDataset

__all__ = ["EpochPlan", "SequentialPlan", "TarDataset", "load_manifest", "manifest_sha256"]
