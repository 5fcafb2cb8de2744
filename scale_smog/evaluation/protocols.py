"""Settings of the evaluation protocols: named ones as published, every number open to a change."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from scale_smog.config import NonNegative, Positive, Recipe, Section, Share
from scale_smog.errors import UserError
from scale_smog.recipe import apply_override, validate

Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Rate, ...], Field(strict=False, min_length=1)]
Steps = Annotated[tuple[Positive, ...], Field(strict=False)]
Milestones = Annotated[tuple[Rate, ...], Field(strict=False)]
HeldOut = Annotated[float, Field(ge=0, le=0.5)]
Decay = Annotated[float, Field(ge=0)]


class LinearConfig(Section):
    """A linear classifier on frozen features; learning rates are for 256 images."""

    setting: Literal["default", "moco_v3", "simclr", "swav", "swin", "logistic"] = "default"
    epochs: Rate = 90.0
    batch: Positive = 1024  # images of a step over all ranks
    learning_rates: Rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # trained side by side
    nesterov: bool = False
    weight_decay: Decay = 0.0
    held_out: HeldOut = 0.02  # of each class's images: chooses among several learning rates
    inverse_penalty: Rate = 1.0  # logistic only: C of the objective C Σ loss + ‖w‖² / 2
    checkpoint_every: Positive = 1000  # steps
    seed: NonNegative = 0


class FinetuneConfig(Section):
    """The whole net and a classifier on a share of the labels; rates are for 256 images."""

    setting: Literal["simclr", "swav"] = "simclr"
    share: Share = 0.01  # of the labels
    list: str = ""  # file names, one a line: SimCLR's published subsets; else a balanced draw
    epochs: Rate = 60.0
    batch: Positive = 4096
    trunk_rate: Rate = 0.05
    head_rate: Rate = 0.05
    milestones: Milestones = ()  # epochs at which the rates fall to a fifth; none: a cosine
    nesterov: bool = True
    checkpoint_every: Positive = 1000
    seed: NonNegative = 0


class FeaturesConfig(Section):
    """Features of a folder or of a split of a dataset, as a file."""

    path: str = ""  # images to embed, labelled or not; default: a split of data.path
    split: str = ""  # default: every split of data.path
    format: Literal["npy", "parquet"] = "npy"
    out: str = ""  # folder; default: features in the run's folder
    projector: NonNegative = 0  # images of each set to show in TensorBoard's projector


class SegmentationConfig(Section):
    """FCN on a dilated ResNet (Long et al. 2015, as in MoCo's section 4.2.3).

    Steps, batch, rate and decay are mmsegmentation's of both sets. Here images keep their size
    before the random factor and are evaluated whole, and there is no auxiliary head and no change
    of colour; there VOC is first enlarged to 512 px and Cityscapes is evaluated in windows.
    """

    setting: Literal["voc", "cityscapes"] = "voc"  # the dataset, in its own layout
    path: str = ""
    train_split: str = "trainaug"
    val_split: str = "val"
    crop_px: Positive = 512
    steps: Positive = 20_000
    batch: Positive = 16
    rate: Rate = 0.01
    workers: NonNegative = 4  # processes of a rank
    checkpoint_every: Positive = 1000
    seed: NonNegative = 0


class DetectionConfig(Section):
    """Mask R-CNN with a feature pyramid, the 1x schedule, synchronised batch norm everywhere."""

    setting: Literal["coco_1x", "coco_2x"] = "coco_1x"
    path: str = ""  # folder with annotations/ and the splits' images
    train_split: str = "train2017"
    val_split: str = "val2017"
    shorter_px: Steps = (640, 672, 704, 736, 768, 800)  # drawn anew for every image
    test_px: Positive = 800
    longer_px: Positive = 1333
    steps: Positive = 90_000
    milestones: Steps = (60_000, 80_000)
    warmup: NonNegative = 500
    batch: Positive = 16
    rate: Rate = 0.02
    workers: NonNegative = 4
    checkpoint_every: Positive = 1000
    seed: NonNegative = 0


class Protocols(Section):
    """One section an evaluation; kNN's and the images' settings are the recipe's `evaluation`."""

    linear: LinearConfig = LinearConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    features: FeaturesConfig = FeaturesConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    detection: DetectionConfig = DetectionConfig()


# What a named setting changes. Sources: MoCo v3 main_lincls.py; SimCLR's README (linear) and
# section B.5 of its paper (semi-supervised); SwAV eval_linear.py and eval_semisup.py; DINO
# eval_linear.py, which the Swin papers of this kind follow; mmsegmentation's FCN schedules; the
# 1x and 2x schedules of Detectron.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {
        "moco_v3": {"learning_rates": [0.1], "batch": 1024, "epochs": 90},
        "simclr": {
            "learning_rates": [0.1],
            "batch": 4096,
            "epochs": 90,
            "weight_decay": 1e-6,
            "nesterov": True,
        },
        "swav": {"learning_rates": [0.3], "batch": 256, "epochs": 100, "weight_decay": 1e-6},
        "swin": {"learning_rates": [0.001], "batch": 1024, "epochs": 100},
        "logistic": {},
    },
    "finetune": {
        "swav": {
            "epochs": 20,
            "batch": 256,
            "milestones": [12, 16],
            "nesterov": False,
        },
    },
    "segmentation": {
        "cityscapes": {"train_split": "train", "crop_px": 769, "steps": 40_000, "batch": 8},
    },
    "detection": {"coco_2x": {"steps": 180_000, "milestones": [120_000, 160_000]}},
}
# Of SimCLR 60 epochs at 1 % and 30 above; of SwAV other rates for trunk and head.
SIMCLR_EPOCHS = {True: 60.0, False: 30.0}  # key: whether the share is 1 % or less
SWAV_RATES = {
    True: {"trunk_rate": 0.02, "head_rate": 5.0},
    False: {"trunk_rate": 0.01, "head_rate": 0.2},
}


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Overrides of the run's recipe, and those of the protocols."""
    recipe, protocols = [], []
    for override in overrides:
        section = override.partition(".")[0]
        (protocols if section in Protocols.model_fields else recipe).append(override)
        known = [*Recipe.model_fields, *Protocols.model_fields]
        if section not in known and "." in override:
            raise UserError(f"no section '{section}' in override '{override}': {', '.join(known)}")
    return recipe, protocols


def load_protocols(overrides: Iterable[str] = ()) -> Protocols:
    """The protocols' settings: defaults, then what a named setting changes, then overrides.

    Raises:
        UserError: unknown key or setting, wrong type or range.
    """
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        apply_override(given, override, Protocols)
    tree = {}
    for section, values in given.items():
        named = NAMED.get(section, {}).get(str(values.get("setting")), {})
        tree[section] = _for_share(section, values) | named | values
    return validate(Protocols, tree)


def _for_share(section: str, values: dict[str, Any]) -> dict[str, Any]:
    share = values.get("share", 0.01)
    if section != "finetune" or not isinstance(share, float | int):
        return {}
    if values.get("setting") == "swav":
        return SWAV_RATES[share <= 0.01]
    return {"epochs": SIMCLR_EPOCHS[share <= 0.01]}
