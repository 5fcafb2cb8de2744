"""VOC 2012 and Cityscapes in their own layouts."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from scale_smog.data.augment import MEAN, STD
from scale_smog.errors import UserError
from scale_smog.evaluation.dense.requirements import read_image, require_file
from scale_smog.evaluation.protocols import SegmentationConfig

IGNORED = 255  # pixels that do not count: borders in VOC, unused classes in Cityscapes
RESIZE_FACTORS = (0.5, 2.0)  # of random scaling
NUM_VOC_CLASSES = 21
NUM_CITYSCAPES_CLASSES = 19


@dataclass(frozen=True)
class SegmentationImages:
    """Pairs of an image and its map of classes.

    Attributes:
        pairs: image file, map file.
        num_classes: C.
        class_of: [256] uint8: a stored value's class, or IGNORED.
    """

    pairs: tuple[tuple[Path, Path], ...]
    num_classes: int
    class_of: np.ndarray

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """An image [3, H, W] uint8 and its classes [H, W] uint8.

        Raises:
            UserError: a file cannot be read, they differ in size, or a class does not exist.
        """
        image_file, map_file = self.pairs[index]
        image = np.asarray(read_image(image_file).convert("RGB"))
        stored = np.asarray(read_image(map_file))
        if stored.shape != image.shape[:2]:
            raise UserError(f"{map_file} is no map of {image_file}: {stored.shape} pixels")
        classes = self.class_of[stored]
        if (wrong := (classes >= self.num_classes) & (classes != IGNORED)).any():
            raise UserError(
                f"{map_file} has class {classes[wrong].max()}, the set has {self.num_classes}"
            )
        return torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(classes)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the names and of the maps' contents."""
        digest = hashlib.sha256()
        for image_file, map_file in self.pairs:
            digest.update(f"{image_file.name}\0{map_file.name}\0".encode())
            digest.update(map_file.read_bytes())
        return digest.hexdigest()


def open_segmentation(config: SegmentationConfig, split: str) -> SegmentationImages:
    """Finds a split of the dataset that the settings name.

    Raises:
        UserError: the folder, a list or a map is missing; it is named.
    """
    folder = Path(config.path)
    if not config.path or not folder.is_dir():
        raise UserError(f"segmentation.path='{config.path}' is no folder: give the dataset's own")
    return (_cityscapes if config.setting == "cityscapes" else _voc)(folder, split)


def _voc(folder: Path, split: str) -> SegmentationImages:
    roots = [folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"]
    root = next((root for root in roots if (root / "JPEGImages").is_dir()), None)
    if root is None:
        raise UserError(f"{folder} is not VOC 2012: it has no JPEGImages")
    # The augmented list (Hariharan et al. 2011) has a folder of maps of its own.
    kind = "SegmentationClassAug" if split.endswith("aug") else "SegmentationClass"
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        others = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt")))
        raise UserError(
            f"no list {listing}: there are {others or 'none'}; see segmentation.*_split"
        )
    names = listing.read_text().split()
    pairs = [(root / "JPEGImages" / f"{n}.jpg", root / kind / f"{n}.png") for n in names]
    return _checked(pairs, NUM_VOC_CLASSES, np.arange(256, dtype=np.uint8))


def _cityscapes(folder: Path, split: str) -> SegmentationImages:
    images = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise UserError(f"{folder} is not Cityscapes: no images in leftImg8bit/{split}")
    maps = folder / "gtFine" / split
    pairs = [
        (path, maps / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds"))
        for path in images
    ]
    class_of = np.full(256, IGNORED, dtype=np.uint8)
    for entry in Cityscapes.classes:
        if 0 <= entry.train_id < IGNORED and entry.id >= 0:
            class_of[entry.id] = entry.train_id
    return _checked(pairs, NUM_CITYSCAPES_CLASSES, class_of)


def _checked(
    pairs: list[tuple[Path, Path]], num_classes: int, class_of: np.ndarray
) -> SegmentationImages:
    for image_file, map_file in pairs:
        require_file(image_file, "an image")
        require_file(map_file, "a map of classes")
    if not pairs:
        raise UserError("the list of images is empty")
    return SegmentationImages(tuple(pairs), num_classes, class_of)


@dataclass(frozen=True)
class TrainingSamples:
    """Random scale, crop and mirror of an image and its map alike."""

    images: SegmentationImages
    crop_px: int

    def __call__(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Normalised [3, crop, crop] float32 and classes [crop, crop] int64."""
        image, classes = self.images.load(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            low, high = RESIZE_FACTORS
            factor = low + (high - low) * torch.rand(()).item()
            size = [max(1, round(side * factor)) for side in classes.shape]
            fill = {tv_tensors.Image: MEAN.tolist(), tv_tensors.Mask: IGNORED}
            augment = v2.Compose(
                [
                    v2.Resize(size, antialias=True),
                    v2.RandomCrop(self.crop_px, pad_if_needed=True, fill=fill),
                    v2.RandomHorizontalFlip(),
                ]
            )
            image, classes = augment(tv_tensors.Image(image), tv_tensors.Mask(classes))
        return normalised(image), classes.as_subclass(Tensor).long()


def normalised(image: Tensor) -> Tensor:
    """[3, H, W] float32 of uint8, with the mean and deviation of pre-training."""
    return vision.normalize(image.as_subclass(Tensor).float(), MEAN.tolist(), STD.tolist())
