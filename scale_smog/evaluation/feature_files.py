"""Features of images as files: npy or parquet, and TensorBoard's projector."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from scale_smog import distributed
from scale_smog.data.datasets import Images, list_splits
from scale_smog.data.loaders.build import open_together
from scale_smog.data.loaders.torch import decode_sample
from scale_smog.errors import UserError
from scale_smog.evaluation.protocols import FeaturesConfig
from scale_smog.evaluation.splits import random_subset
from scale_smog.evaluation.task import EvaluationTask
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import printable

THUMBNAIL_PX = 32


def write_features(
    paths: Sequence[str], overrides: Iterable[str], with_paper: bool = False
) -> None:
    """Embeds image sets with a checkpoint's backbone: `<set>-features` and labels, row by row.

    npy: [N, F] float32 and [N] int64, -1 where an image has no label. parquet: columns `sample`
    (a file's name, or the sample's id in tars), `label` and `feature`. `<set>-names.json` has the
    `samples` in the order of the rows, and the `classes` that labels count.

    Raises:
        UserError: no such images; on every rank.
    """
    if len(paths) != 1:
        raise UserError(f"features takes one checkpoint, not {len(paths)}")
    with distributed.process_group() as device:
        task = EvaluationTask.open("features", paths[0], overrides, device)
        config = task.protocols.features
        if config.format == "parquet":
            _import_pyarrow()
        out = Path(config.out) if config.out else task.run_dir / "features"
        encoder = task.frozen(task.backbone())
        for name, dataset in _sets(config, task.recipe.data.path).items():
            z = task.embed(encoder, dataset, np.arange(dataset.num_samples))
            if distributed.is_main():
                z = z.cpu()
                _write(config.format, out, name, z, dataset)
                print(f"{out / name}-features.{config.format}: {z.shape[0]} x {z.shape[1]}")
                if config.projector:
                    shown = random_subset(len(z), config.projector)
                    _show_in_projector(task.run_dir, name, shown, z[shown], dataset)


def _sets(config: FeaturesConfig, data_path: str) -> dict[str, Images]:
    path = config.path or data_path
    if config.split:
        return {config.split: open_together(path, config.split)}
    if splits := distributed.call_on_main(lambda: list_splits(path)):
        return {name: open_together(path, name) for name in splits}
    return {Path(path).name: open_together(path, "train")}


def _write(kind: str, out: Path, name: str, z: Tensor, dataset: Images) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        samples = [printable(name) for name in getattr(dataset, "names", map(str, range(len(z))))]
        names = {"classes": list(dataset.classes), "samples": samples}
        (out / f"{name}-names.json").write_text(json.dumps(names), encoding="utf-8")
        if kind == "npy":
            np.save(out / f"{name}-features.npy", z.numpy())
            np.save(out / f"{name}-labels.npy", dataset.labels)
            return
        pyarrow, parquet = _import_pyarrow()
        values = pyarrow.array(z.flatten().numpy())
        table = pyarrow.table(
            {
                "sample": samples,
                "label": dataset.labels,
                "feature": pyarrow.FixedSizeListArray.from_arrays(values, z.shape[1]),
            }
        )
        parquet.write_table(table, out / f"{name}-features.parquet")
    except OSError as error:
        raise UserError(f"cannot write features.out={out}: {error.strerror}") from None


def _import_pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("features.format=parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow, parquet


def _show_in_projector(
    run_dir: Path, name: str, ids: np.ndarray, z: Tensor, dataset: Images
) -> None:
    """TensorBoard turns them by PCA or t-SNE; each point is a small picture with its class."""
    from torch.utils.tensorboard import SummaryWriter

    pictures = []
    for sample_id in ids.tolist():
        encoded = np.frombuffer(dataset.read(sample_id), dtype=np.uint8)
        image = decode_sample(dataset, sample_id, encoded)  # [3, H, W]
        image = vision.center_crop(image, [min(image.shape[1:])])
        pictures.append(vision.resize(image, [THUMBNAIL_PX, THUMBNAIL_PX], antialias=True))
    words = [dataset.classes[label] if label >= 0 else "" for label in dataset.labels[ids]]
    # Not among the training's events: who reads those as they come would leave them for these.
    with SummaryWriter(str(run_dir / run_layout.BOARD_FOLDER / "projector")) as board:
        board.add_embedding(z, words, torch.stack(pictures).float() / 255, tag=f"features/{name}")
