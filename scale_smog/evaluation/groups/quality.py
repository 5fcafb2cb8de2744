"""How pure the groups are, measured by labels (SMoG Figure 5)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.grouping import perplexity, spherical_kmeans

KMEANS_ITERATIONS = 20
LOW_ENTROPY = 1.0  # nats, as of 2.7 classes that are equally frequent; the paper names no bound


@dataclass(frozen=True)
class GroupQuality:
    """Groups against C classes; entropies in nats: 0 is a single class, ln C all classes alike."""

    sizes: Tensor  # [G] int64, images of each group that has some
    entropy: Tensor  # [G] float64, of the classes inside each of them
    nmi: float  # normalised mutual information of groups and classes, 0 to 1
    num_groups: int  # K, empty ones included

    @property
    def entropy_mean(self) -> float:
        """Every group in use counts alike, as in Figure 5."""
        return self.entropy.mean().item()

    @property
    def entropy_weighted(self) -> float:
        """Every image counts alike: the classes' entropy that is left once the group is known."""
        return (self.entropy * self.sizes).sum().item() / int(self.sizes.sum())

    @property
    def low_entropy_groups(self) -> float:
        """Share of the groups in use that are purer than `LOW_ENTROPY`; those of one image are."""
        return (self.entropy < LOW_ENTROPY).double().mean().item()

    @property
    def low_entropy_images(self) -> float:
        """Share of the images that are in these groups."""
        return self.sizes[self.entropy < LOW_ENTROPY].sum().item() / int(self.sizes.sum())

    @property
    def results(self) -> dict[str, float]:
        """What a results file keeps."""
        return {
            "num_groups": self.num_groups,
            "in_use": len(self.sizes),
            "perplexity": perplexity(self.sizes),
            "largest_share": self.sizes.max().item() / int(self.sizes.sum()),
            "entropy_mean": self.entropy_mean,
            "entropy_weighted": self.entropy_weighted,
            "low_entropy_groups": self.low_entropy_groups,
            "low_entropy_images": self.low_entropy_images,
            "nmi": self.nmi,
        }


def group_quality(groups: Tensor, classes: Tensor, num_groups: int) -> GroupQuality:
    """Compares a grouping with labels.

    Args:
        groups: of each image [N] int64, 0 to K - 1.
        classes: of each image [N] int64, 0 or more.
        num_groups: K.
    """
    num_classes = int(classes.max()) + 1
    table = torch.bincount(groups * num_classes + classes, minlength=num_groups * num_classes)
    table = table.view(num_groups, num_classes).double()  # [K, C] images
    sizes = table.sum(dim=1)  # [K]
    entropy = class_entropy(table)  # [K]
    of_groups, of_classes = class_entropy(sizes[None]), class_entropy(table.sum(dim=0)[None])
    shared = of_classes - (entropy * sizes).sum() / sizes.sum()  # mutual information
    nmi = shared / ((of_groups + of_classes) / 2).clamp(min=torch.finfo(torch.float64).tiny)
    used = sizes > 0
    return GroupQuality(sizes[used].long(), entropy[used], nmi.item(), num_groups)


def cluster_features(features: Tensor, num_groups: int) -> Tensor:
    """Groups [N] int64 of features that come without groups, by k-means on the sphere.

    Args:
        features: [N, D], the same on every rank, each of which clusters its part; a collective.
        num_groups: K, at most N.

    Raises:
        UserError: more groups than features.
    """
    if num_groups > len(features):
        raise UserError(f"{len(features)} features do not make {num_groups} groups")
    rows = F.normalize(features.float())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    start = rows[order[:num_groups].to(rows.device)]
    own = rows.tensor_split(distributed.world_size())[distributed.rank()]
    groups = spherical_kmeans(own, start, iterations=KMEANS_ITERATIONS).assignments  # [n]
    most = -(-len(rows) // distributed.world_size())
    whole = distributed.gather_columns(F.pad(groups, (0, most - len(groups)), value=-1)[None])[0]
    return whole[whole >= 0]


def class_entropy(counts: Tensor) -> Tensor:
    """Entropy of each row's distribution, in nats: [R, C] -> [R]; 0 for a row without counts."""
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(dim=1)
