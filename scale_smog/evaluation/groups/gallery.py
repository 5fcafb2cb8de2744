"""The groups as a gallery: of each its figures and the images closest to it, in one JSON file."""

import json
from base64 import b64encode
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_smog.data.datasets import Images
from scale_smog.evaluation.groups.pictures import thumbnail
from scale_smog.evaluation.groups.quality import class_entropy
from scale_smog.runtime.files import write_atomically

THUMBNAIL_PX = 64
MOST_GROUPS = 200  # a fair sample of more, by their tightness
IMAGES_A_GROUP = 12
MOST_BYTES = 2_500_000  # of all images: a page with them can be sent by mail
CHUNK_ROWS = 4096


def write_gallery(
    path: Path, dataset: Images, ids: np.ndarray, z: Tensor, groups: Tensor, usage: Tensor
) -> None:
    """Writes the gallery of a run's groups.

    Args:
        path: JSON to write.
        dataset: where the images are; their labels, where they have some, give an entropy.
        ids: sample ids [N] of a sample of the training images.
        z: their unit features [N, D].
        groups: [K, D].
        usage: features a group over the last steps [K].
    """
    similarity, nearest = _nearest(z, groups)
    members = _members(similarity, nearest, len(groups))
    tightness = {k: similarity[own].mean().item() for k, own in members.items()}
    shown = _sample(sorted(members, key=lambda k: -tightness[k]))
    images = _thumbnails(dataset, {k: ids[members[k][:IMAGES_A_GROUP].numpy()] for k in shown})
    entries = [
        {
            "group": k,
            "size": int(usage[k]),
            "tightness": round(tightness[k], 4),
            **_classes(dataset, ids[members[k].numpy()]),
            "images": images[k],
        }
        for k in shown
    ]
    facts = {"num_groups": len(groups), "num_images": len(ids), "px": THUMBNAIL_PX}
    write_atomically(path, json.dumps(facts | {"groups": entries}).encode())


def _nearest(z: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity [N] of each image to the most similar group, and this group [N]; on the CPU."""
    chunks = [(rows.to(groups) @ groups.T).max(dim=1) for rows in z.split(CHUNK_ROWS)]
    similarity, nearest = zip(*chunks, strict=True)
    return torch.cat(similarity).cpu(), torch.cat(nearest).cpu()


def _members(similarity: Tensor, nearest: Tensor, num_groups: int) -> dict[int, Tensor]:
    """Rows of each group that has some, the most similar first."""
    order = similarity.argsort(descending=True, stable=True)
    by_group = order[nearest[order].argsort(stable=True)]
    sizes = torch.bincount(nearest, minlength=num_groups).tolist()
    return {k: rows for k, rows in enumerate(by_group.split(sizes)) if len(rows)}


def _sample(groups: list[int]) -> list[int]:
    """At most `MOST_GROUPS`, evenly over the list."""
    places = np.linspace(0, len(groups) - 1, min(MOST_GROUPS, len(groups))).round().astype(int)
    return [groups[place] for place in places]


def _thumbnails(dataset: Images, ids: dict[int, np.ndarray]) -> dict[int, list[str]]:
    """WebP files in base64, all groups' closest images first, until there are enough bytes."""
    images: dict[int, list[str]] = {group: [] for group in ids}
    num_bytes = 0
    for place in range(IMAGES_A_GROUP):
        for group, samples in ids.items():
            if place < len(samples) and num_bytes < MOST_BYTES:
                file = BytesIO()
                picture = thumbnail(dataset, int(samples[place]), THUMBNAIL_PX)
                picture.save(file, "WEBP", quality=75)
                num_bytes += file.tell()
                images[group].append(b64encode(file.getvalue()).decode())
    return images


def _classes(dataset: Images, ids: np.ndarray) -> dict[str, Any]:
    """Entropy in nats and the commonest classes of these images; nothing where they have none."""
    labels = dataset.labels[ids]
    if not len(dataset.classes) or (labels < 0).any():
        return {}
    counts = torch.bincount(torch.from_numpy(labels), minlength=len(dataset.classes))
    common = Counter(dict(enumerate(counts.tolist()))).most_common(3)
    return {
        "entropy": round(class_entropy(counts[None]).item(), 4),
        "classes": {dataset.classes[label]: count for label, count in common if count},
    }
