"""COCO in its own layout: `annotations/instances_SPLIT.json` and a folder of images a split."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from scale_smog.errors import UserError
from scale_smog.evaluation.dense.requirements import (
    import_pycocotools,
    read_image,
    require_file,
)
from scale_smog.evaluation.protocols import DetectionConfig


@dataclass(frozen=True)
class DetectionImages:
    """Images with boxes and masks.

    Attributes:
        folder: of the images.
        coco: pycocotools' index of the annotations.
        ids: image ids in ascending order.
        categories: category ids; a label is a place in them, counted from 1.
        names: of the categories.
        sha256: hex, of the annotation file.
    """

    folder: Path
    coco: Any
    ids: tuple[int, ...]
    categories: tuple[int, ...]
    names: tuple[str, ...]
    sha256: str

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8.

        Raises:
            UserError: the file cannot be read.
        """
        path = self.folder / self.coco.imgs[self.ids[index]]["file_name"]
        pixels = np.asarray(read_image(path).convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def with_objects(self) -> "DetectionImages":
        """Only the images that have something to learn from.

        Raises:
            UserError: there are none.
        """
        kept = tuple(i for i in self.ids if self.objects(i))
        if not kept:
            raise UserError(f"{self.folder}: no image has an annotated object")
        return DetectionImages(
            self.folder, self.coco, kept, self.categories, self.names, self.sha256
        )

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """Annotations of an image, without crowds and boxes of no size."""
        annotations = self.coco.imgToAnns[image_id]
        return [a for a in annotations if not a.get("iscrowd", 0) and min(a["bbox"][2:]) >= 1]


def open_detection(config: DetectionConfig, split: str) -> DetectionImages:
    """Reads the annotations of a split.

    Raises:
        UserError: the folder or a file is missing or damaged, or pycocotools is not installed.
    """
    coco_class = import_pycocotools()[0].COCO
    folder = Path(config.path)
    if not config.path or not folder.is_dir():
        raise UserError(f"detection.path='{config.path}' is no folder: give COCO's own")
    path = folder / "annotations" / f"instances_{split}.json"
    content = require_file(path, "the annotation file").read_bytes()
    if not (folder / split).is_dir():
        raise UserError(f"the images are missing: no folder {folder / split}")
    coco = coco_class()
    try:
        coco.dataset = json.loads(content)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        categories = tuple(sorted(coco.cats))
        names = tuple(coco.cats[c]["name"] for c in categories)
        missing = [i["file_name"] for i in coco.imgs.values() if not _is_there(folder / split, i)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an annotation file of COCO: {error}") from None
    if missing:
        raise UserError(f"{len(missing)} images are missing from {folder / split}: {missing[0]}")
    ids, sha256 = tuple(sorted(coco.imgs)), hashlib.sha256(content).hexdigest()
    return DetectionImages(folder / split, coco, ids, categories, names, sha256)


def _is_there(folder: Path, image: dict[str, Any]) -> bool:
    return (folder / image["file_name"]).is_file()


@dataclass(frozen=True)
class TrainingSamples:
    """An image and its objects, mirrored or not."""

    images: DetectionImages

    def __call__(self, index: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """[3, H, W] float32, 0 to 1, and torchvision's target: boxes, labels, masks."""
        images, image_id = self.images, self.images.ids[index]
        image = images.image(index)
        objects = images.objects(image_id)
        x, y, w, h = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).T
        masks = np.stack([images.coco.annToMask(a) for a in objects])
        size = (image.shape[1], image.shape[2])
        corners = torch.stack([x, y, x + w, y + h], dim=1)
        target = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),  # type: ignore
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "labels": torch.tensor(
                [1 + images.categories.index(a["category_id"]) for a in objects]
            ),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, target = v2.RandomHorizontalFlip()(tv_tensors.Image(image), target)
        return (
            image.as_subclass(Tensor).float() / 255,
            {name: value.as_subclass(Tensor) for name, value in target.items()},
        )
