"""Every setting of a run: frozen, strict models whose defaults are the paper's ResNet-50 values.

What stands below a setting is its meaning: `smog explain`, docs/settings.md and the JSON schema for
editors all show it. "Paper:" before its end names the place in SMoG's paper.
"""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

INT64 = 2**63
Positive = Annotated[int, Field(gt=0, lt=INT64)]
NonNegative = Annotated[int, Field(ge=0, lt=INT64)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[int, Field(ge=10)]  # of a timeout: to find out who is late takes some


def _without_tilde(path: str) -> str:
    if path.startswith("~"):
        raise ValueError(f"{path}: no shell replaces ~ here; write the folder's whole path")
    return path


Place = Annotated[str, AfterValidator(_without_tilde)]  # a path, or a place in a store
Pair = Annotated[tuple[Share, Share], Field(strict=False)]  # YAML has lists, not tuples

Figure = Literal[
    "loss",
    "knn",
    "online_knn",
    "online_linear",
    "groups_in_use",
    "group_perplexity",
    "rankme_bank",
    "rankme_features",
    "images_per_s",
]

StartParts = Annotated[
    tuple[Literal["backbone", "heads", "momentum", "groups"], ...], Field(strict=False)
]
NetName = Literal["online", "momentum"]


class StrictModel(BaseModel):
    """Unknown keys are refused, nothing is coerced, nothing changed later."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Section(StrictModel):
    """A section of a recipe."""


class RunConfig(Section):
    """How long, where, and how often to report."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["steps"]}, {"required": ["epochs"]}]}
    )

    dir: Place = ""
    """Folder of the run; empty: runs/<name of the recipe>."""
    mirror: str = ""
    """Place in a store, such as s3://bucket/run, or a folder that is there, for copies of the
    checkpoints; a run whose run.dir has none as new resumes from the newest copy."""
    steps: Positive | None = None
    """Length of the run in optimizer steps; give either this or run.epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training images; give either this or run.steps.
    Paper: section 4.1, Table 1."""
    seed: NonNegative = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    small_data: bool = False
    """Derive what the recipe leaves open (groups, bank, resets, learning rate, times of evaluations
    and checkpoints) from the number of images: for datasets much smaller than ImageNet."""
    log_every: Positive = 10
    """Steps from one line of metrics to the next."""
    checkpoint_every: NonNegative = 1000
    """Steps from one checkpoint to the next; 0: only at the end."""
    keep_checkpoints: Positive = 3
    """Number of the newest checkpoints that are kept."""
    keep_checkpoint_every: NonNegative = 0
    """Steps from one checkpoint that is kept for good to the next, besides the newest; 0: none."""
    max_skipped: Positive = 10
    """Steps in a row that may be skipped because their loss or gradients are not finite."""
    evaluate_every: NonNegative = 0
    """Steps from one kNN evaluation in training to the next; 0: never."""
    start_from: Place = ""
    """Run, checkpoint, exported folder, file of weights or hf-hub:USER/NAME that a new run is
    initialised from; what does not fit is initialised as usual, and is named."""
    start_parts: StartParts = ("backbone", "heads", "momentum", "groups")
    """What to take of run.start_from."""
    start_sha256: str = ""
    """SHA-256 of the backbone's weights in run.start_from: filled in when the run begins, and
    checked where it is given."""
    stop_below: dict[Figure, float] = {}
    """Values below which a logged figure ends the run, such as {group_perplexity: 10, knn: 0.2};
    of loss, knn, online_knn, online_linear, groups_in_use, group_perplexity, rankme_bank,
    rankme_features and images_per_s. The newest checkpoint stands."""
    stop_patience: Positive = 3
    """Values in a row that must be below run.stop_below."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of run.steps and run.epochs")
        return self


class DataConfig(Section):
    """Which images, and who decodes and augments them."""

    path: Place
    """Folder of images or of tars, or tars in a store, such as s3://bucket/imagenet."""
    cache_dir: Place = ""
    """Folder on a local disk for the images of a data.path in a store; empty: scale_smog_cache in
    the folder for temporary files."""
    cache_gib: Annotated[float, Field(gt=0)] = 100.0
    """Most GiB that the images of a split take in data.cache_dir, for all ranks of a machine."""
    num_images: Positive = 1_281_167
    """Training images to expect: `--dry-run` plans with them where the dataset is not there yet."""
    global_batch: Positive = 4096
    """Images of one step over all ranks. Paper: section 4.1, Table 1."""
    loader: Literal["dali", "torch", "memory", "fast", "stream", "synthetic"] = "dali"
    """Who decodes and augments: NVIDIA DALI, torch's worker processes, memory (a small set,
    decoded once), fast (DALI's own reader) and stream (tars over the network), both of inexact
    order, or synthetic (random views, for timing)."""
    stream: str = ""
    """Tars to train on with data.loader=stream, such as https://host/train-{000000..000146}.tar."""
    allow_pipe: bool = False
    """Whether data.stream may name commands, such as pipe:cat train-000000.tar."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where views are made; auto: on the GPU where there is one and the loader can."""
    workers: NonNegative = 8
    """Decoding threads (dali) or processes (torch) of a rank."""
    order: Literal["global", "block"] = "global"
    """How an epoch is mixed: global, over all images; block, within data.block_shards shards at
    a time, for disks that dislike random reads."""
    block_shards: Positive = 16
    """Shards that data.order=block mixes at a time."""
    num_small_crops: NonNegative = 0
    """Small views of an image besides the two large ones; the paper's multi-crop has 4. Paper:
    Table 1."""
    large_px: Positive = 224
    """Side of a large view in pixels."""
    small_px: Positive = 96
    """Side of a small view in pixels."""

    @model_validator(mode="after")
    def _a_stream_has_its_loader(self) -> Self:
        if (self.loader == "stream") != bool(self.stream):
            raise ValueError("data.loader=stream and data.stream go together")
        return self


class AugmentConfig(Section):
    """BYOL's two asymmetric schemes (SMoG section 3.4).

    `blur` and `solarize` hold scheme A's and scheme B's probability.
    """

    large_scale: Pair = (0.2, 1.0)
    """Smallest and largest area of a large crop, as shares of the image's; the paper leaves
    those of two views open, 0.2 is MoCo v3's. Paper: section 3.4."""
    small_scale: Pair = (0.05, 0.2)
    """Smallest and largest area of a small crop, as shares of the image's. Paper: section 3.4."""
    flip: Share = 0.5
    """Probability of a mirrored view. Paper: section 3.4."""
    jitter: Share = 0.8
    """Probability of changed colours. Paper: section 3.4."""
    brightness: Share = 0.4
    """Largest change of brightness. Paper: section 3.4."""
    contrast: Share = 0.4
    """Largest change of contrast. Paper: section 3.4."""
    saturation: Share = 0.2
    """Largest change of saturation. Paper: section 3.4."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest change of hue in turns: 0.5 is half the colour circle. Paper: section 3.4."""
    grey: Share = 0.2
    """Probability of a view without colours. Paper: section 3.4."""
    blur: Pair = (1.0, 0.1)
    """Probability of a Gaussian blur in scheme A and in scheme B; small crops use B's. Paper:
    section 3.4."""
    solarize: Pair = (0.0, 0.2)
    """Probability of inverted bright pixels in scheme A and in scheme B; small crops use B's.
    Paper: section 3.4."""


class ModelConfig(Section):
    """The nets and the momentum net's coefficient."""

    backbone: str = "resnet50"
    """resnet_tiny, resnet18, resnet50, swin_tiny, any name that timm knows, or one that an
    installed package offers. Paper: section 4.1, Tables 1 to 3."""
    width: Positive = 1
    """Factor on all channels of a ResNet. Paper: Table 3."""
    small_images: bool = False
    """A 3x3 first convolution without max-pool, for ResNets on images of about 32 px."""
    weights: Place = ""
    """Initial weights of the backbone: a file of timm or torchvision, an exported folder, or
    hf-hub:USER/NAME; empty: random weights."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an image leaves out a residual branch of the online net's last block in
    training; it grows with depth from 0, as timm's drop_path_rate. For timm's ViT, Swin, ConvNeXt
    and their kin; the paper names none."""
    dim: Positive = 128
    """Size D of the projected features: 128 for ResNets, 256 for transformers. Paper: section
    4.1."""
    head_width: Positive = 2048
    """Hidden size of projector and predictor. Paper: section 4.1."""
    identity_predictor: bool = False
    """Initialise the predictor as the identity; the paper leaves its initialisation open."""
    batch_norm: Literal["global", "node", "local"] | Positive = "global"
    """Ranks that share their batch statistics: all (global), those of a host (node), a number
    of neighbours, or none (local)."""
    ema: Share = 0.999
    """Alpha of the momentum net: momentum <- alpha * momentum + (1 - alpha) * online, at every
    step. Paper: section 4.1."""

    @model_validator(mode="after")
    def _identity_needs_width(self) -> Self:
        if self.identity_predictor and self.head_width < 2 * self.dim:
            raise ValueError(
                f"model.identity_predictor needs model.head_width of at least {2 * self.dim}, "
                f"twice model.dim"
            )
        return self


class NetPlan(NamedTuple):
    """Which heads a method's nets have, and what passes through them at a step; SMoG's."""

    is_projection_normed: bool = True  # a batch norm behind the projector
    predictor: Literal["mlp", "normed mlp", "prototypes", "none"] = "mlp"
    num_prototypes: int = 0
    num_online_views: int = 1  # large ones that are trained, besides the small ones
    num_momentum_views: int = 1  # 0: there is no momentum net


class MethodPlan(NamedTuple):
    """What other parts must know of a method."""

    nets: NetPlan
    has_groups: bool = False  # images are put into groups, and small crops are trained
    kept_features: Literal["none", "bank", "queue", "all images"] = "none"  # from step to step


DEFAULT_NETS = NetPlan()
_TWO_VIEWS = NetPlan(num_online_views=2, num_momentum_views=0)
METHOD_PLANS = {
    "smog": MethodPlan(DEFAULT_NETS, has_groups=True, kept_features="bank"),
    "swav": MethodPlan(
        _TWO_VIEWS._replace(is_projection_normed=False, predictor="prototypes"),
        has_groups=True,
        kept_features="queue",
    ),
    "deepcluster_v2": MethodPlan(
        _TWO_VIEWS._replace(is_projection_normed=False, predictor="none"),
        has_groups=True,
        kept_features="all images",
    ),
    "simclr": MethodPlan(_TWO_VIEWS._replace(predictor="none")),
    "moco_v3": MethodPlan(_TWO_VIEWS._replace(predictor="normed mlp", num_momentum_views=2)),
    "byol": MethodPlan(_TWO_VIEWS._replace(is_projection_normed=False, num_momentum_views=2)),
}


class MethodConfig(Section):
    """What the nets are trained for: SMoG, or a method that its paper compares with."""

    name: Literal["smog", "swav", "deepcluster_v2", "simclr", "moco_v3", "byol"] = "smog"
    """SMoG; groups by Sinkhorn's balanced codes (swav) or by k-means of all images at every epoch
    (deepcluster_v2); images against one another (simclr, moco_v3); or each view from the other
    (byol). Paper: Figure 5, Tables 1 to 6."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Temperature of simclr, moco_v3 and grouping.instance_warmup_steps, by which similarities of
    images are divided. Groups have grouping.temperature."""
    epsilon: Annotated[float, Field(gt=0)] = 0.05
    """Entropy regularisation of swav's codes: the smaller, the harder the codes."""
    queue_steps: NonNegative = 0
    """Steps whose features balance swav's codes besides the batch's; for batches that are small
    beside the number of groups."""
    queue_after_epochs: Annotated[float, Field(ge=0)] = 15.0
    """Epochs before swav's queue is used: features that change fast are of no use."""
    frozen_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Initial epochs in which swav's prototypes are frozen."""

    @property
    def plan(self) -> MethodPlan:
        """Its row."""
        return METHOD_PLANS[self.name]

    @property
    def has_groups(self) -> bool:
        """Whether images are put into groups."""
        return self.plan.has_groups

    @property
    def has_bank(self) -> bool:
        """Whether groups are reset from a bank of the last steps' features."""
        return self.plan.kept_features == "bank"


class GroupingConfig(Section):
    """Groups, their synchronous update and their periodic reset (SMoG sections 3.2 and 3.3)."""

    num_groups: Annotated[int, Field(ge=2)] = 3000
    """Number K of groups. Paper: section 4.1, Table 7c."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Tau, by which similarities are divided in the loss. Paper: section 4.1."""
    beta_start: Share = 1.0
    """Beta of the first step: a group keeps this share of itself when it is updated. Paper:
    section 3.2, Table 7a."""
    beta_end: Share = 0.99
    """Beta of the last step; in between it changes linearly. Paper: section 3.2, Table 7a."""
    operator: Literal["momentum", "averaging", "adopt_latest", "random_select"] = "momentum"
    """How a group follows its features: the momentum update, an average in which a step's mean
    weighs 1 / n, n being the features since the last reset, their latest mean, or a random feature.
    Paper: section 3.2, Table 7d."""
    init: Literal["kmeans", "random"] = "kmeans"
    """Initial groups: k-means over features of the initial net, or random directions. Paper:
    section 4.1."""
    reset_every: Positive = 300
    """Steps from one reset to the next. Paper: section 3.3."""
    bank_steps: Positive | None = None
    """Steps whose features are kept for k-means; empty: grouping.reset_every. Paper: section
    3.3."""
    kmeans: bool = True
    """Whether a reset clusters the kept features into new groups. Paper: section 3.3, Table 7b."""
    kmeans_iterations: Positive = 10
    """Updates of one k-means."""
    reset_momentum: bool = True
    """Whether a reset makes the momentum net a copy of the online net. Paper: section 3.3,
    Table 7b."""
    detach_groups: bool = False
    """Send no gradient through the updated groups: an ablation that the paper does not have."""
    instance_warmup_steps: NonNegative = 0
    """First steps that contrast images instead of groups, as SimCLR does; the paper has none."""


class OptimizerConfig(Section):
    """lr = base_lr * global_batch / lr_batch, linear warm-up, cosine to zero (SMoG section 4.1)."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    """LARS for ResNets, AdamW for transformers, or SGD. Paper: section 4.1."""
    base_lr: Annotated[float, Field(gt=0)] = 0.3
    """Learning rate for optimizer.lr_batch images: the peak is base_lr * global_batch /
    lr_batch. Paper: section 4.1."""
    lr_batch: Positive = 256
    """Images that optimizer.base_lr is for: 256 for ResNets, 2048 for transformers. Paper:
    section 4.1."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    """Weight decay of all weights but biases and norms. Paper: section 4.1."""
    momentum: Share = 0.9
    """Momentum of LARS and SGD."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of all gradients together; 0: they are not clipped."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 10.0
    """Epochs in which the learning rate grows linearly from zero; a cosine to zero follows.
    Paper: section 4.1."""


ZERO_BUCKET_NUMEL = 50_000_000  # of ZeRO's gradients; DeepSpeed allocates it whole, 200 MB in fp32


class EngineConfig(Section):
    """How the nets are spread over the ranks, and in which precision they compute."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = "ddp"
    """How nets and optimizer are spread over the ranks: whole on each (ddp), DeepSpeed's ZeRO
    stages, FSDP2 over all ranks (fsdp) or within a node (hsdp). All train the same model."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Precision of the nets' arithmetic; fp64 is for tests, and the ZeRO engines lack it."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are reduced between ranks."""
    accumulate: Positive = 1
    """Micro-batches of a step: batch norm sees one of them, groups, bank, loss and gradient the
    whole batch."""
    activation_checkpointing: bool = False
    """Recompute a stage's activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile, stage by stage."""
    cuda_graphs: bool = False
    """Launch the momentum net's forward pass as one CUDA graph: for steps that the host limits, on
    engines that hold whole weights (ddp, zero1, zero2)."""
    deepspeed: dict[str, Any] = {}
    """Further settings of DeepSpeed for zero1, zero2 and zero3; those that change what is
    trained are refused."""

    @model_validator(mode="after")
    def _fp64_is_not_for_zero(self) -> Self:
        if self.precision == "fp64" and self.is_zero:
            raise ValueError(
                "engine.precision=fp64 is a test precision of ddp, fsdp and hsdp: "
                f"engine.kind={self.kind} keeps its weights in fp32"
            )
        if self.precision == "fp64" and self.reduce_precision == "bf16":
            raise ValueError("engine.precision=fp64 does not go with engine.reduce_precision=bf16")
        return self

    @model_validator(mode="after")
    def _graphs_need_whole_weights(self) -> Self:
        if self.cuda_graphs and self.kind not in ("ddp", "zero1", "zero2"):
            raise ValueError(
                f"engine.cuda_graphs=true does not go with engine.kind={self.kind}, which gathers "
                "the momentum net's weights at every step: take ddp, zero1 or zero2"
            )
        return self

    @model_validator(mode="after")
    def _compiled_code_holds_its_weights(self) -> Self:
        if self.compile and self.kind == "zero3":
            raise ValueError(
                "engine.compile does not go with engine.kind=zero3, which fetches weights layer by "
                "layer; take fsdp"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_settings_keep_engines_equal(self) -> Self:
        if self.deepspeed and not self.is_zero:
            raise ValueError(f"engine.deepspeed is for zero1 to zero3, not engine.kind={self.kind}")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("engine.deepspeed: zero_optimization is a mapping of settings")
        given = [(name, name, DEEPSPEED_KEYS) for name in self.deepspeed]
        given += [(f"zero_optimization.{name}", name, DEEPSPEED_ZERO_KEYS) for name in zero]
        for path, name, allowed in given:
            if name not in allowed:
                ours = DEEPSPEED_OURS.get(name)
                advice = f"set {ours} instead" if ours else f"free are {', '.join(sorted(allowed))}"
                raise ValueError(
                    f"engine.deepspeed: {path} might train another model than the other engines: "
                    f"{advice}"
                )
        if self.kind == "zero3" and zero.get("overlap_comm"):
            raise ValueError(
                "engine.deepspeed: zero3 with overlap_comm gathers weights on a stream that does "
                "not wait for the last step's updates: leave it out"
            )
        return self

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs this engine."""
        return self.kind.startswith("zero")

    @property
    def num_online_forwards(self) -> int:
        """Passes of an image through the online net: micro-batches are projected beforehand."""
        return 1 if self.accumulate == 1 else 2


# Settings of DeepSpeed that change how it works and reports, never what is trained.
DEEPSPEED_KEYS = {
    "zero_optimization",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
}
DEEPSPEED_ZERO_KEYS = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
}
DEEPSPEED_OURS = {  # what the recipe has a key of its own for
    "activation_checkpointing": "engine.activation_checkpointing",
    "amp": "engine.precision",
    "bf16": "engine.precision",
    "communication_data_type": "engine.reduce_precision",
    "fp16": "engine.precision",
    "gradient_accumulation_steps": "engine.accumulate",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_epochs",
    "stage": "engine.kind",
    "torch_autocast": "engine.precision",
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "engine.accumulate",
}


class EvaluationConfig(Section):
    """The weighted kNN classifier on frozen backbone features."""

    k: Positive = 20
    """Neighbours that vote in kNN."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of the votes' weights exp(similarity / temperature)."""
    batch: Positive = 256
    """Images of one forward pass of a rank."""
    image_px: Positive = 224
    """Side of the centre crop in pixels."""
    crop_share: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centre crop as a share of the image's shorter side: 0.875 is 224 of 256."""
    num_train_images: NonNegative = 0
    """Training images among which kNN looks for neighbours; 0: all."""
    num_test_images: NonNegative = 0
    """Test images that knn, linear and finetune judge, drawn at random; 0: all."""
    net: NetName = "online"
    """Which of the two nets is evaluated: the one that is trained, or the momentum net, its mean
    over the last steps."""
    online: bool = False
    """A kNN and a linear classifier on the views in training, at every run.log_every."""
    baselines: bool = False
    """Evaluate raw pixels, shrunk to at most 32 px, and a net of random weights too."""


class DeadlinesConfig(Section):
    """How long a phase may take before the run ends and says which rank is behind."""

    start_s: Seconds = 1800
    """Seconds up to the end of the first step: building, compiling, k-means."""
    data_s: Seconds = 600
    """Seconds that a batch may take to come."""
    step_s: Seconds = 600
    """Seconds that a step may take."""
    kmeans_s: Seconds = 900
    """Seconds that a reset may take."""
    evaluation_s: Seconds = 3600
    """Seconds that an evaluation may take."""
    saving_s: Seconds = 1800
    """Seconds to wait for a checkpoint that is written in the background."""


DERIVED = {"num_groups", "bank_steps", "reset_every"}  # of the groups of small sets


class Recipe(Section):
    """A whole run; parts get their section (ARCHITECTURE.md names who sees all of it)."""

    run: RunConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    grouping: GroupingConfig = GroupingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    def with_values(self, section: str, **values: Any) -> Self:
        """A copy with other values in a section, which are taken as they are."""
        changed = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: changed})

    @property
    def start(self) -> str:
        """What the nets begin with, but for random weights: `run.start_from` or `model.weights`."""
        return self.run.start_from or self.model.weights

    @property
    def bank_steps(self) -> int:
        """Steps of features that the bank keeps."""
        return self.grouping.bank_steps or self.grouping.reset_every

    @property
    def nets(self) -> NetPlan:
        """Of the method."""
        plan = self.method.plan.nets
        is_trained = plan.predictor == "prototypes"
        return plan._replace(num_prototypes=self.grouping.num_groups if is_trained else 0)

    def num_kept_features(self, batch: int) -> int:
        """Features that a rank of `batch` images a step keeps from step to step."""
        return {
            "none": 0,
            "bank": self.bank_steps * batch,
            "queue": 2 * self.method.queue_steps * batch,
            "all images": -(-self.data.num_images * batch // self.data.global_batch),
        }[self.method.plan.kept_features]

    @property
    def kmeans_every(self) -> float:
        """Steps from one k-means over the kept features to the next; 0: there is none."""
        if self.method.plan.kept_features == "all images":
            return self.data.num_images / self.data.global_batch
        is_reset = self.method.has_bank and self.grouping.kmeans
        return float(self.grouping.reset_every) if is_reset else 0.0

    @property
    def num_init_features(self) -> int:
        """Features that the first k-means reads: max(4 K, global batch), at most the bank."""
        bank = self.bank_steps * self.data.global_batch
        return min(max(4 * self.grouping.num_groups, self.data.global_batch), bank)

    @model_validator(mode="after")
    def _enough_features_to_cluster(self) -> Self:
        if not self.method.has_bank:
            return self
        if self.run.small_data and not DERIVED <= self.grouping.model_fields_set:
            return self  # checked when small_data.py has filled them in
        bank = self.bank_steps * self.data.global_batch
        warmup = self.grouping.instance_warmup_steps
        clusters = self.grouping.init == "kmeans" or self.grouping.kmeans or warmup
        if clusters and self.grouping.num_groups > bank:
            raise ValueError(
                f"grouping.num_groups={self.grouping.num_groups} is more than the {bank} features "
                f"to cluster (bank_steps x global_batch): take at most {bank} groups"
            )
        if 0 < warmup * self.data.global_batch < self.grouping.num_groups:
            raise ValueError(
                f"grouping.instance_warmup_steps={warmup} leaves fewer features than the "
                f"{self.grouping.num_groups} groups that are made of them: take at least "
                f"{-(-self.grouping.num_groups // self.data.global_batch)} steps, or 0"
            )
        return self

    @model_validator(mode="after")
    def _the_evaluated_net_is_there(self) -> Self:
        if self.evaluation.net == "momentum" and not self.nets.num_momentum_views:
            raise ValueError(
                f"evaluation.net=momentum: method.name={self.method.name} has no momentum net"
            )
        return self

    @model_validator(mode="after")
    def _a_predictor_can_begin_as_identity(self) -> Self:
        can = self.nets.predictor == "mlp" and self.nets.is_projection_normed
        if self.model.identity_predictor and not can:
            raise ValueError(
                f"model.identity_predictor=true: method.name={self.method.name} has no predictor "
                "of batch-normalised projections that could begin as the identity: take false"
            )
        return self

    @model_validator(mode="after")
    def _figures_that_end_the_run_are_logged(self) -> Self:
        missing = {
            "knn": not (self.run.evaluate_every or self.run.small_data) and "run.evaluate_every",
            "online_knn": not self.evaluation.online and "evaluation.online",
            "online_linear": not self.evaluation.online and "evaluation.online",
            "groups_in_use": not self.method.has_groups and "a method with groups",
            "group_perplexity": not self.method.has_groups and "a method with groups",
            "rankme_bank": not self.method.has_bank and "method.name=smog",
        }
        for name in self.run.stop_below:
            if needed := missing.get(name):
                raise ValueError(f"run.stop_below: {name} is logged only with {needed}")
        return self

    @model_validator(mode="after")
    def _online_labels_are_the_datasets(self) -> Self:
        if self.evaluation.online and self.data.loader in ("stream", "synthetic"):
            raise ValueError(
                f"evaluation.online=true learns from the dataset's labels, and "
                f"data.loader={self.data.loader} does not have them: take data.loader=dali"
            )
        return self

    @model_validator(mode="after")
    def _images_are_told_apart(self) -> Self:
        keeps_all = self.method.plan.kept_features == "all images"
        if keeps_all and self.data.loader in ("fast", "stream"):
            raise ValueError(
                f"method.name={self.method.name} keeps a cluster of every image, and "
                f"data.loader={self.data.loader} does not number them: take data.loader=dali"
            )
        return self

    @model_validator(mode="after")
    def _small_crops_are_trained(self) -> Self:
        if self.data.num_small_crops and not self.method.has_groups:
            raise ValueError(
                f"method.name={self.method.name} trains two large views: take "
                "data.num_small_crops=0"
            )
        return self
