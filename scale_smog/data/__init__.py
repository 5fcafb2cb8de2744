"""From images in tars or folders to batches of views.

What needs torch is imported from its own module, so that the sharding tools start without it.
"""

from scale_smog.data.datasets import open_split
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.data.manifest import load_manifest, manifest_sha256
from scale_smog.data.plan import EpochPlan, SequentialPlan
from scale_smog.data.tar_dataset import TarDataset

__all__ = [
    "EpochPlan",
    "FolderDataset",
    "SequentialPlan",
    "TarDataset",
    "load_manifest",
    "manifest_sha256",
    "open_split",
]
