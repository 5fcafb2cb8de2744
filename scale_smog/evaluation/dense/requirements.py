"""What segmentation and detection need to be there: files of the datasets, optional packages."""

from pathlib import Path
from typing import Any

from PIL import Image

from scale_smog.data.images import BadImageError, decode
from scale_smog.errors import UserError

INSTALL = "pip install -e '.[dense]'"


def require_file(path: Path, purpose: str) -> Path:
    """Raises a UserError unless there is such a file."""
    if not path.is_file():
        raise UserError(f"{purpose} is missing: no file {path}")
    return path


def read_image(path: Path) -> Image.Image:
    """A file's image, decoded in full.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except BadImageError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def import_pycocotools() -> tuple[Any, Any, Any]:
    """Its modules coco, cocoeval and mask.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError:
        raise UserError(f"detection needs pycocotools: {INSTALL}") from None
    return coco, cocoeval, mask


def import_torchmetrics() -> Any:
    """Its module classification.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torchmetrics import classification
    except ImportError:
        raise UserError(f"segmentation needs torchmetrics: {INSTALL}") from None
    return classification
