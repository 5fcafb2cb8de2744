"""Which image goes into which shard, planned before the first one is decoded.

A seeded shuffle, then cuts by size at the source.
"""

import tarfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scale_smog.config import StrictModel
from scale_smog.counter_rng import permutation
from scale_smog.data.images import Preprocessing
from scale_smog.data.manifest import SplitManifest
from scale_smog.data.prepare.sources import Source
from scale_smog.data.prepare.writer import ShardJob

_MIB = 2**20


class ShardPlan(StrictModel):
    """All that decides a split's bytes. Two runs with equal plans write equal files."""

    seed: int
    options: dict[str, int | None]
    source_fingerprint: str

    def difference(self, other: "ShardPlan | SplitManifest") -> str:
        """What `other` was made with, where that is not as here; empty if they agree."""
        mine = {"seed": self.seed, **self.options}
        theirs = {"seed": other.seed, **other.options}
        changed = [f"{key} {value}" for key, value in theirs.items() if mine.get(key) != value]
        if self.source_fingerprint != other.source_fingerprint:
            changed.append("other images")
        return ", ".join(changed)


def plan_shards(
    source: Source, plan: ShardPlan, split: str, out: Path, work: Path
) -> list[ShardJob]:
    """The shards of a split, in order; files become theirs in `out`, unfinished ones in `work`."""
    options: dict[str, Any] = plan.options
    images = [source.images[index] for index in _order(source, plan.seed)]
    sizes = [image.num_bytes for image in images]
    cuts = cut_into_shards(sizes, options["shard_mib"], options["shard_samples"])
    preprocessing = Preprocessing(
        bool(options["full_check"]), options["resize_shorter"], options["reencode"]
    )
    return [
        ShardJob(
            name=f"{split}-{number:06d}",
            first_key=cut.start,
            images=tuple(images[cut]),
            read=source.read,
            preprocessing=preprocessing,
            out=out,
            work=work,
        )
        for number, cut in enumerate(cuts)
    ]


def _order(source: Source, seed: int) -> Iterable[int]:
    """A permutation of the images; those of a block stay neighbours."""
    order = permutation(len(source.images), seed)
    if not source.blocks:
        return order
    turn = permutation(max(source.blocks) + 1, seed)
    return sorted(order, key=lambda index: turn[source.blocks[index]])


def cut_into_shards(sizes: Sequence[int], shard_mib: int, shard_samples: int) -> list[slice]:
    """Cuts a sequence of images so that no shard exceeds either limit, one image excepted.

    Args:
        sizes: encoded sizes, bytes, in the order of the shards.
        shard_mib: largest tar, MiB.
        shard_samples: most images in a tar.
    """
    cuts, tar_bytes = [0], 0
    for position, size in enumerate(sizes):
        # Image and label, each rounded up to whole blocks behind a header block.
        sample_bytes = tarfile.BLOCKSIZE * (3 + -(-size // tarfile.BLOCKSIZE))
        is_full = tar_bytes + sample_bytes > shard_mib * _MIB
        if position > cuts[-1] and (is_full or position - cuts[-1] == shard_samples):
            cuts.append(position)
            tar_bytes = 0
        tar_bytes += sample_bytes
    return [slice(*ends) for ends in pairwise([*cuts, len(sizes)])]
