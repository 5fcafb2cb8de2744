"""Every setting of a run: frozen, strict models whose defaults are the paper's ResNet-50 values."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

INT64 = 2**63
Positive = Annotated[int, Field(gt=0, lt=INT64)]
NonNegative = Annotated[int, Field(ge=0, lt=INT64)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[int, Field(ge=10)]  # of a deadline: to find out who is late takes some
Pair = Annotated[tuple[Share, Share], Field(strict=False)]  # YAML has lists, not tuples


class StrictModel(BaseModel):
    """Unknown keys are refused, nothing is coerced, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Section(StrictModel):
    """A section of a recipe."""


class RunConfig(Section):
    """How long, where, and how often to report."""

    dir: str = ""  # default: runs/<recipe-name>
    steps: Positive | None = None  # exactly one of steps and epochs
    epochs: Annotated[float, Field(gt=0)] | None = None
    seed: NonNegative = 0
    small_data: bool = False  # what is not given follows from the number of images (small_data.py)
    log_every: Positive = 10
    checkpoint_every: NonNegative = 1000  # 0: only at the end
    keep_checkpoints: Positive = 3  # the newest ones
    keep_checkpoint_every: NonNegative = 0  # and for good those of every so many steps; 0: none
    max_skipped: Positive = 10  # steps in a row that may be left out because they are not finite
    evaluate_every: NonNegative = 0  # 0: never during training

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of run.steps and run.epochs")
        return self


class DataConfig(Section):
    """Which images, and who decodes and augments them."""

    path: str
    num_images: Positive = 1_281_167  # to train on, for a plan before the dataset is there
    global_batch: Positive = 4096  # images of one step over all ranks
    loader: Literal["dali", "torch", "memory", "fast", "stream", "synthetic"] = "dali"
    stream: str = ""  # loader=stream: tars to train on, https://host/train-{000000..000146}.tar
    allow_pipe: bool = False  # data.stream may name commands, as in pipe:cat train-000000.tar
    device: Literal["auto", "cpu", "gpu"] = "auto"  # makes the views
    workers: NonNegative = 8  # decoding threads (dali) or processes (torch) of a rank
    order: Literal["global", "block"] = "global"  # block: mixed within block_shards shards
    block_shards: Positive = 16
    num_small_crops: NonNegative = 0  # the paper's multi-crop: 4
    large_px: Positive = 224
    small_px: Positive = 96

    @model_validator(mode="after")
    def _a_stream_has_its_loader(self) -> Self:
        if (self.loader == "stream") != bool(self.stream):
            raise ValueError("data.loader=stream and data.stream go together")
        return self


class AugmentConfig(Section):
    """BYOL's two asymmetric schemes (SMoG section 3.4).

    `blur` and `solarize` hold scheme A's and scheme B's probability.
    """

    large_scale: Pair = (0.2, 1.0)  # area of a large crop
    small_scale: Pair = (0.05, 0.2)  # area of a small crop
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # turns: 0.5 is half the colour circle
    grey: Share = 0.2
    blur: Pair = (1.0, 0.1)  # small crops use scheme B's values
    solarize: Pair = (0.0, 0.2)


class ModelConfig(Section):
    """The nets and the momentum net's coefficient."""

    backbone: str = "resnet50"  # resnet_tiny, resnet18, resnet50, swin_tiny, or any timm name
    width: Positive = 1
    small_images: bool = False  # 3x3 stem for 32-px images
    weights: str = ""  # file of timm or torchvision to start the backbone from; "": random
    dim: Positive = 128  # of the projected features; 256 for transformers
    head_width: Positive = 2048
    identity_predictor: bool = False  # begins with p = z; the paper leaves its first weights open
    batch_norm: Literal["global", "node", "local"] | Positive = "global"  # or ranks in a group
    ema: Share = 0.999  # alpha: momentum <- alpha * momentum + (1 - alpha) * online

    @model_validator(mode="after")
    def _identity_needs_width(self) -> Self:
        if self.identity_predictor and self.head_width < 2 * self.dim:
            raise ValueError(
                f"model.identity_predictor needs model.head_width of at least {2 * self.dim}, "
                f"twice model.dim"
            )
        return self


class GroupingConfig(Section):
    """Groups, their synchronous update and their periodic reset (SMoG sections 3.2 and 3.3)."""

    num_groups: Annotated[int, Field(ge=2)] = 3000
    temperature: Annotated[float, Field(gt=0)] = 0.1
    beta_start: Share = 1.0
    beta_end: Share = 0.99
    operator: Literal["momentum", "averaging", "adopt_latest", "random_select"] = "momentum"
    init: Literal["kmeans", "random"] = "kmeans"
    reset_every: Positive = 300  # steps
    bank_steps: Positive | None = None  # steps of features kept; default: reset_every
    kmeans: bool = True  # cluster the bank at a reset
    kmeans_iterations: Positive = 10
    reset_momentum: bool = True  # momentum net <- online net at a reset
    detach_groups: bool = False  # ablation: no gradient through the updated groups
    instance_warmup_steps: NonNegative = 0  # not in the paper: first steps contrast images (SimCLR)


class OptimizerConfig(Section):
    """lr = base_lr * global_batch / lr_batch, linear warm-up, cosine to zero (SMoG section 4.1)."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    base_lr: Annotated[float, Field(gt=0)] = 0.3
    lr_batch: Positive = 256
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    momentum: Share = 0.9  # of LARS and SGD
    clip_norm: Annotated[float, Field(ge=0)] = 0.0  # max global gradient norm; 0: no clipping
    warmup_epochs: Annotated[float, Field(ge=0)] = 10.0


class EngineConfig(Section):
    """How the nets are spread over the ranks, and in which precision they compute."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = "ddp"
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # fp64: a test precision, not under ZeRO
    reduce_precision: Literal["fp32", "bf16"] = "fp32"  # of gradients on their way between ranks
    accumulate: Positive = 1  # micro-batches of a step; batch norm sees one, all else the batch
    activation_checkpointing: bool = False  # forget a stage's activations, compute them again
    compile: bool = False  # torch.compile, stage by stage
    deepspeed: dict[str, Any] = {}  # further settings of DeepSpeed, for zero1, zero2 and zero3

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
    "round_robin_gradients",
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
    temperature: Annotated[float, Field(gt=0)] = 0.07
    batch: Positive = 256  # images of one forward pass of a rank
    image_px: Positive = 224
    crop_share: Annotated[float, Field(gt=0, le=1)] = 0.875  # of the shorter side: 224 of 256
    num_train_images: NonNegative = 0  # kNN: images the neighbours are taken from; 0: all
    num_test_images: NonNegative = 0
    online: bool = False  # kNN and a linear classifier on the views in training, every log_every
    baselines: bool = False  # at the end, also judge raw pixels and the random net


class DeadlinesConfig(Section):
    """How long a phase may take before the run ends and says which rank is behind."""

    start_s: Seconds = 1800  # up to the end of the first step: building, compiling, k-means
    data_s: Seconds = 600
    step_s: Seconds = 600
    kmeans_s: Seconds = 900
    evaluation_s: Seconds = 3600
    saving_s: Seconds = 1800  # waiting for a checkpoint that is written in the background


DERIVED = {"num_groups", "bank_steps", "reset_every"}  # of the groups of small sets


class Recipe(Section):
    """A whole run; parts get their section (ARCHITECTURE.md names who sees all of it)."""

    run: RunConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    grouping: GroupingConfig = GroupingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @property
    def bank_steps(self) -> int:
        """Steps of features that the bank keeps."""
        return self.grouping.bank_steps or self.grouping.reset_every

    @property
    def num_init_features(self) -> int:
        """Features that the first k-means reads: max(4 K, global batch), at most the bank."""
        bank = self.bank_steps * self.data.global_batch
        return min(max(4 * self.grouping.num_groups, self.data.global_batch), bank)

    @model_validator(mode="after")
    def _enough_features_to_cluster(self) -> Self:
        if self.run.small_data and not DERIVED <= self.grouping.model_fields_set:
            return self  # checked when small_data.py has filled them in
        bank = self.bank_steps * self.data.global_batch
        clusters = self.grouping.init == "kmeans" or self.grouping.kmeans
        if clusters and self.grouping.num_groups > bank:
            raise ValueError(
                f"grouping.num_groups={self.grouping.num_groups} is more than the {bank} features "
                f"to cluster (bank_steps x global_batch): take at most {bank} groups"
            )
        warmup = self.grouping.instance_warmup_steps
        if 0 < warmup * self.data.global_batch < self.grouping.num_groups:
            raise ValueError(
                f"grouping.instance_warmup_steps={warmup} leaves fewer features than the "
                f"{self.grouping.num_groups} groups that are made of them: take at least "
                f"{-(-self.grouping.num_groups // self.data.global_batch)} steps, or 0"
            )
        return self
