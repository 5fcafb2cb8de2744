"""Small sets in the exact layouts of VOC 2012, Cityscapes and COCO: rectangles on a grey ground."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {1: (220, 40, 40), 2: (40, 200, 60), 3: (50, 70, 230)}  # of a class


def scene(seed: int, width: int = 72, height: int = 56) -> tuple[np.ndarray, np.ndarray, list]:
    """An image [H, W, 3], its classes [H, W] and its boxes (class, left, top, width, height)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(100, 140, (height, width, 3), dtype=np.uint8)
    classes = np.zeros((height, width), dtype=np.uint8)
    boxes = []
    for column in range(2):
        kind = int(rng.integers(1, 4))
        w, h = int(rng.integers(16, 28)), int(rng.integers(16, 32))
        left = column * width // 2 + int(rng.integers(0, width // 2 - w))
        top = int(rng.integers(0, height - h))
        image[top : top + h, left : left + w] = COLOURS[kind]
        classes[top : top + h, left : left + w] = kind
        boxes.append((kind, left, top, w, h))
    return image, classes, boxes


def write_voc(folder: Path, num_train: int = 6, num_val: int = 5) -> Path:
    """`folder/VOCdevkit/VOC2012`; borders of the picture are 255, as VOC's of objects."""
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for split, count, first in (("train", num_train, 0), ("val", num_val, 100)):
        names = []
        for number in range(first, first + count):
            image, classes, _ = scene(number)
            classes[:2] = classes[-2:] = 255
            names.append(f"2007_{number:06d}")
            Image.fromarray(image).save(root / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
            mask = Image.fromarray(classes, mode="P")
            mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
            mask.save(root / "SegmentationClass" / f"{names[-1]}.png")
        text = "\n".join(names) + "\n"
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return folder / "VOCdevkit"


def write_cityscapes(folder: Path, num_train: int = 4, num_val: int = 3) -> Path:
    """`leftImg8bit` and `gtFine` with a city a split; ids are Cityscapes' own, 7 is the road."""
    ids = np.array([4, 7, 8, 11], dtype=np.uint8)  # static (ignored), road, sidewalk, building
    for split, city, count, first in (
        ("train", "aachen", num_train, 0),
        ("val", "lindau", num_val, 100),
    ):
        for number in range(first, first + count):
            image, classes, _ = scene(number)
            name = f"{city}_{number:06d}_000019"
            for kind, suffix, content in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", ids[classes]),
            ):
                (folder / kind / split / city).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(folder / kind / split / city / f"{name}_{suffix}.png")
    return folder


def write_coco(folder: Path, num_train: int = 6, num_val: int = 4) -> Path:
    """`annotations/instances_*2017.json`, `train2017` and `val2017`; category ids have gaps."""
    (folder / "annotations").mkdir(parents=True)
    category = {1: 1, 2: 17, 3: 90}
    for split, count, first in (("train2017", num_train, 0), ("val2017", num_val, 100)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(first, first + count):
            image, _, boxes = scene(number)
            name = f"{number:012d}.jpg"
            Image.fromarray(image).save(folder / split / name, quality=95)
            height, width, _ = image.shape
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for kind, x, y, w, h in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category[kind],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
        categories = [{"id": i, "name": f"thing{i}"} for i in category.values()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder
