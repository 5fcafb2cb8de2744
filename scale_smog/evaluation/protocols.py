"""Settings of the evaluation protocols: named ones as published, every number open to a change."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from scale_smog.config import NonNegative, Positive, Recipe, Section
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
    """Whose values to take for what is not given: MoCo v3's, SimCLR's, SwAV's, those usual for
    Swin, or logistic (the minimum of scikit-learn's LogisticRegression, on features of centre
    crops)."""
    epochs: Rate = 90.0
    """Passes over the training images."""
    batch: Positive = 1024
    """Images of a step over all ranks."""
    learning_rates: Rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """For 256 images; several are trained side by side on one forward pass, the best is chosen
    on held-out images."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: Decay = 0.0
    """Of the classifier."""
    held_out: HeldOut = 0.02
    """Share of each class's training images that chooses among several learning rates."""
    inverse_penalty: Rate = 1.0
    """For logistic only: C of the objective C * sum of losses + |w|^2 / 2."""
    checkpoint_every: Positive = 1000
    """Steps after which an interrupted evaluation can go on."""
    seed: NonNegative = 0
    """Of the order of the images and their crops."""


class FinetuneConfig(Section):
    """The whole net and a classifier on a share of the labels; rates are for 256 images."""

    setting: Literal["simclr", "swav"] = "simclr"
    """Whose values to take for what is not given. Paper: Table 4, by SimCLR's protocol."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Of the labels. Paper: Table 4."""
    list: str = ""
    """File of image names, one a line, such as SimCLR's published subsets; empty: a draw of
    equally many a class."""
    epochs: Rate = 60.0
    """Passes over the labelled images."""
    batch: Positive = 4096
    """Images of a step over all ranks; at most the labelled ones."""
    trunk_rate: Rate = 0.05
    """Learning rate of the backbone for 256 images."""
    head_rate: Rate = 0.05
    """Learning rate of the classifier for 256 images."""
    milestones: Milestones = ()
    """Epochs at which the rates fall to a fifth; none: a cosine to zero."""
    nesterov: bool = True
    """Nesterov's momentum."""
    checkpoint_every: Positive = 1000
    """Steps after which an interrupted evaluation can go on."""
    seed: NonNegative = 0
    """Of the draw, the order of the images and their crops."""


class FeaturesConfig(Section):
    """Features of a folder or of a split of a dataset, as a file."""

    path: str = ""
    """Images to embed, labelled or not; empty: the run's dataset."""
    split: str = ""
    """Split to embed; empty: every split."""
    format: Literal["npy", "parquet"] = "npy"
    """What the features are written as."""
    out: str = ""
    """Folder of the files; empty: features in the run's folder."""
    projector: NonNegative = 0
    """Images of each set to show in TensorBoard's projector."""


class SegmentationConfig(Section):
    """FCN on a dilated ResNet (Long et al. 2015, as in MoCo's section 4.2.3).

    Steps, batch, rate and decay are mmsegmentation's of both sets. Here images keep their size
    before the random factor and are evaluated whole, and there is no auxiliary head and no change
    of colour; there VOC is first enlarged to 512 px and Cityscapes is evaluated in windows.
    """

    setting: Literal["voc", "cityscapes"] = "voc"
    """The dataset, in its own layout. Paper: Table 5."""
    path: str = ""
    """Folder of the dataset."""
    train_split: str = "trainaug"
    """Split to train on."""
    val_split: str = "val"
    """Split to judge on."""
    crop_px: Positive = 512
    """Side of the random crop in pixels."""
    steps: Positive = 20_000
    """Length of the training."""
    batch: Positive = 16
    """Images of a step over all ranks."""
    rate: Rate = 0.01
    """First learning rate."""
    workers: NonNegative = 4
    """Processes of a rank that read images."""
    checkpoint_every: Positive = 1000
    """Steps after which an interrupted evaluation can go on."""
    seed: NonNegative = 0
    """Of the order of the images and their crops."""


class DetectionConfig(Section):
    """Mask R-CNN with a feature pyramid, the 1x schedule, synchronised batch norm everywhere."""

    setting: Literal["coco_1x", "coco_2x"] = "coco_1x"
    """Detectron's schedule: 1x or twice as long. Paper: Table 6."""
    path: str = ""
    """Folder of COCO, with annotations/ and the splits' images."""
    train_split: str = "train2017"
    """Split to train on."""
    val_split: str = "val2017"
    """Split to judge on."""
    shorter_px: Steps = (640, 672, 704, 736, 768, 800)
    """Sides to which an image's shorter one is scaled in training, one drawn at a time."""
    test_px: Positive = 800
    """Side to which it is scaled in the test."""
    longer_px: Positive = 1333
    """Most that the longer side may then have."""
    steps: Positive = 90_000
    """Length of the training."""
    milestones: Steps = (60_000, 80_000)
    """Steps at which the rate falls to a tenth."""
    warmup: NonNegative = 500
    """Steps in which the rate grows from zero."""
    batch: Positive = 16
    """Images of a step over all ranks."""
    rate: Rate = 0.02
    """Learning rate after warm-up."""
    workers: NonNegative = 4
    """Processes of a rank that read images."""
    checkpoint_every: Positive = 1000
    """Steps after which an interrupted evaluation can go on."""
    seed: NonNegative = 0
    """Of the order of the images and their scales."""


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
