"""Short runs of every engine with the real loop, and the same in plain torch to compare with."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import checkpoint, distributed
from scale_smog.config import DEFAULT_NETS, MethodConfig, ModelConfig, NetPlan, Recipe
from scale_smog.data.batch import Batch
from scale_smog.engine import build_engine
from scale_smog.grouping import FeatureBank, MomentumGroups
from scale_smog.loop import train
from scale_smog.loss import group_contrastive_loss
from scale_smog.methods import build_method
from scale_smog.models import MomentumNet, OnlineNet, process_group_for, synchronise_batch_norm
from scale_smog.models.siamese import build_nets_around
from scale_smog.reporting.metrics import Metrics
from scale_smog.reporting.progress import Progress
from scale_smog.runtime import phases
from scale_smog.schedules import Schedules, due
from scale_smog.state import TrainState

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
NUM_STEPS, GLOBAL_BATCH, DIM, NUM_GROUPS = 8, 24, 16, 10
NUM_IMAGES = NUM_STEPS * GLOBAL_BATCH // 2  # two epochs
# AdamW divides by the gradient's size: where that is rounding, so is the step.
RATES = {"lars": 0.5, "adamw": 6e-4}
TRUST = 0.001

States = dict[str, Tensor]


class SmoothBackbone(nn.Module):
    """Convolutions with batch norms, in stages; one weight of a single row.

    GELU, not ReLU: an input near zero has another sign in float32 than in float64 now and then,
    and a gradient that jumps there has no digits to compare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(self._conv(3, 8, 2), nn.BatchNorm2d(8), nn.GELU())
        self.layer2 = nn.Sequential(self._conv(8, 12, 1), nn.BatchNorm2d(12), nn.GELU())
        self.gate = nn.Conv2d(12, 1, 1)  # no second or third rank has a row of it
        self.num_features = 12

    @staticmethod
    def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 12]
        x = self.layer2(self.layer1(images))
        return (x * torch.sigmoid(self.gate(x))).mean(dim=(2, 3))


def build_tiny_nets(seed: int, plan: NetPlan = DEFAULT_NETS) -> tuple[OnlineNet, MomentumNet]:
    torch.manual_seed(seed)
    model = ModelConfig(dim=DIM, head_width=24)
    return build_nets_around(SmoothBackbone(), model, plan, nn.GELU)


def first_groups(dtype: torch.dtype) -> MomentumGroups:
    groups = MomentumGroups(NUM_GROUPS, DIM, seed=0)
    return groups.to(dtype=dtype)


def recipe_of(folder: Path, **engine: Any) -> Recipe:
    """A recipe of the tiny nets.

    Args:
        folder: of the run.
        engine: keys of the engine's section, and `optimizer` (its name), `batch_norm`, `clip_norm`,
            `method` (a section).
    """
    optimizer, method = engine.pop("optimizer", "lars"), engine.pop("method", {})
    num_small_crops = int(MethodConfig.model_validate(method).has_groups)
    return Recipe.model_validate(
        {
            "run": {"dir": str(folder), "steps": NUM_STEPS, "checkpoint_every": 0},
            "data": {"path": "", "global_batch": GLOBAL_BATCH, "num_small_crops": num_small_crops},
            "method": method,
            "model": {"dim": DIM, "ema": 0.9, "batch_norm": engine.pop("batch_norm", "global")},
            "grouping": {
                "num_groups": NUM_GROUPS,
                "reset_every": 4,
                "temperature": 0.5,
                "beta_end": 0.9,
            },
            "optimizer": {
                "name": optimizer,
                "base_lr": RATES[optimizer],
                "lr_batch": GLOBAL_BATCH,
                "weight_decay": 1e-3,
                "warmup_epochs": 0.0,
                "clip_norm": engine.pop("clip_norm", 0.0),
            },
            "engine": {"precision": "fp32", **engine},
        }
    )


def schedules_of(recipe: Recipe, num_steps: int) -> Schedules:
    # Twice the steps: the cosine must not end the comparison with steps of almost nothing.
    schedules = Schedules(recipe.optimizer, recipe.grouping, GLOBAL_BATCH, 2 * NUM_STEPS, 4)
    schedules.num_steps = num_steps
    return schedules


def global_batch(step: int) -> tuple[list[Tensor], Tensor]:
    """Two large views and a small one, each [B, 3, h, w] float64, that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randn(3 * GLOBAL_BATCH, 3, 4, 4, generator=generator, dtype=torch.float64)
    large = F.interpolate(coarse, size=12, mode="bilinear")
    first, second, small = large.chunk(3)
    return [first, second], small[..., :8, :8]


def batches(first: int, num_small_crops: int = 1):
    """This rank's slice of every step's batch."""
    size = GLOBAL_BATCH // distributed.world_size()
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    label = torch.full((size,), -1)
    for step in range(first, NUM_STEPS):
        large, small = global_batch(step)
        ids = (torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH) % NUM_IMAGES
        yield Batch([x[mine] for x in large], [small[mine]] * num_small_crops, label, ids[mine])


def build_state(recipe: Recipe, ranks_per_node: int | None = None) -> TrainState:
    """As `state.build_state`, with tiny nets and another seed on every rank."""
    size = distributed.world_size()
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node or size)
    seed = distributed.rank()  # rank 0's weights must win
    online, momentum = build_tiny_nets(seed, recipe.nets)
    scope = process_group_for(recipe.model.batch_norm, size)
    for net in (online, momentum):
        synchronise_batch_norm(net, scope)
    batch = GLOBAL_BATCH // size
    engine = build_engine(online, momentum, recipe.optimizer, recipe.engine, batch)
    return TrainState(engine, build_method(recipe, engine, batch, NUM_IMAGES))


class Silence(Metrics):
    """No metrics: writing them takes longer than the training."""

    def __init__(self) -> None:
        self._is_main = False


def run(recipe: Recipe, state: TrainState, num_steps: int = NUM_STEPS) -> None:
    """Trains to `num_steps`, or to a stop; the loop ends with a checkpoint in `run.dir`."""
    schedules = schedules_of(recipe, num_steps)
    loader = batches(state.step, recipe.data.num_small_crops)
    checkpoints = checkpoint.Checkpoints(recipe.run, {})
    progress = Progress(recipe, Silence(), num_steps, state.engine.device)
    with suppress(phases.StopRequested):
        train(recipe.run, state, loader, schedules, progress, checkpoints, lambda step: None)


def final_state(folder: Path) -> States:
    """Tensors of a run's newest checkpoint."""
    return checkpoint.load(checkpoint.list_checkpoints(folder)[-1])[0]


def difference(a: States, b: States) -> dict[str, float]:
    """max |a - b| / max(1, max |b|) for each kind of tensor that `b` has."""
    assert a.keys() >= b.keys(), b.keys() - a.keys()
    worst: dict[str, float] = {}
    for kind in sorted({_kind(name) for name in b}):
        names = [name for name in b if _kind(name) == kind]
        scale = max(1.0, *(b[name].abs().max().item() for name in names))
        worst[kind] = max((a[n].double() - b[n].double()).abs().max().item() for n in names) / scale
        worst[kind] = math.inf if math.isnan(worst[kind]) else worst[kind]
    return worst


def _kind(name: str) -> str:
    is_statistic = "running" in name or "num_batches" in name
    return name.split(".")[0] + (".statistics" if is_statistic else "")


def micro_batches(world_size: int, accumulate: int) -> list[Tensor]:
    """Rows of the global batch that batch norm sees together: each rank's i-th part."""
    rows = torch.arange(GLOBAL_BATCH).view(world_size, accumulate, -1)
    return [rows[:, i].flatten() for i in range(accumulate)]


def plain_run(recipe: Recipe, world_size: int = 1, num_steps: int = NUM_STEPS) -> States:
    """The same training on one rank in float64: plain torch, one parameter at a time.

    With `engine.accumulate`, the micro-batches are those of `world_size` ranks.
    """
    return _train_plainly(recipe, world_size, num_steps)[0]


def plain_ratios(recipe: Recipe) -> dict[str, float]:
    """Trust ratios of the first step, by parameter."""
    return _train_plainly(recipe, 1, num_steps=1)[1].ratios


def _train_plainly(
    recipe: Recipe, world_size: int, num_steps: int
) -> tuple[States, "PlainOptimizer"]:
    rows = micro_batches(world_size, recipe.engine.accumulate)
    order = torch.cat(rows).argsort()
    online, momentum = (net.double().train() for net in build_tiny_nets(seed=0))
    groups = first_groups(torch.float64)
    bank = FeatureBank(recipe.bank_steps, GLOBAL_BATCH, DIM, torch.device("cpu"))
    optimizer = PlainOptimizer(online, recipe)
    schedules = schedules_of(recipe, num_steps)
    for step in range(num_steps):
        now, (large, small) = schedules.at(step), global_batch(step)
        online_view, momentum_view = reversed(large) if step % 2 else large
        reset = step > 0 and due(step, recipe.grouping.reset_every)
        if reset:
            groups.reseed_from(bank)
            own = {k: v for k, v in online.state_dict().items() if not k.startswith("predictor")}
            momentum.load_state_dict(own)
        outputs = [online(online_view[i], [small[i]]) for i in rows]
        z, p, _ = (torch.cat(x, dim=-2)[..., order, :] for x in zip(*outputs, strict=True))
        momentum_z = torch.cat([momentum(momentum_view[i]) for i in rows])[order]
        target = groups.assign(momentum_z)
        new_groups = groups.updated_by(z, now.beta)
        group_contrastive_loss(p, new_groups, target, recipe.grouping.temperature).backward()
        optimizer.step(now.lr, now.weight_decay)
        groups.commit(new_groups)
        bank.push(z)
        follow(momentum, online, recipe.model.ema)
    state = {f"online.{k}": v for k, v in online.state_dict().items()}
    state |= {f"momentum.{k}": v for k, v in momentum.state_dict().items()}
    state |= {f"optimizer.{k}": v for k, v in optimizer.state().items()}
    state |= {f"groups.{k}": v for k, v in groups.state_dict().items()}
    return {k: v.detach().clone() for k, v in state.items()}, optimizer


@torch.no_grad()
def follow(momentum: nn.Module, online: nn.Module, alpha: float) -> None:
    leaders = dict(online.named_parameters())
    for name, follower in momentum.named_parameters():
        follower.copy_(alpha * follower + (1 - alpha) * leaders[name])


class PlainOptimizer:
    """LARS (You et al. 2017) or torch's AdamW; biases and norms neither decayed nor adapted."""

    def __init__(self, net: nn.Module, recipe: Recipe):
        self.parameters = dict(net.named_parameters())
        self.config = recipe.optimizer
        self.buffers = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.num_steps = 0
        self.ratios: dict[str, float] = {}
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "decays": True},
            {"params": [p for p in self.parameters.values() if p.dim() <= 1], "decays": False},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, foreach=False)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        if self.config.name == "adamw":
            for group in self.adamw.param_groups:
                group |= {"lr": lr, "weight_decay": weight_decay if group["decays"] else 0.0}
            self.adamw.step()
        else:
            for name, w in self.parameters.items():
                self._lars(name, w, lr, weight_decay)
        self.num_steps += 1
        for w in self.parameters.values():
            w.grad = None

    def _lars(self, name: str, w: Tensor, lr: float, weight_decay: float) -> None:
        update = w.grad
        assert update is not None
        if w.dim() > 1:
            w_norm, g_norm = w.norm().item(), update.norm().item()
            self.ratios[name] = TRUST * w_norm / (g_norm + weight_decay * w_norm)
            update = self.ratios[name] * (update + weight_decay * w)
        self.buffers[name] = self.config.momentum * self.buffers[name] + update
        w -= lr * self.buffers[name]

    def state(self) -> States:
        state = {"num_steps": torch.tensor(self.num_steps)}
        if self.config.name == "adamw":
            for name, p in self.parameters.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[f"{name}.{key}"] = self.adamw.state[p][key]
            return state
        return state | {f"{name}.momentum_buffer": x for name, x in self.buffers.items()}


def same_on_all_ranks(values: dict[str, Tensor]) -> bool:
    """Whether every rank holds the same bits; a collective."""
    flat = torch.cat([x.detach().double().flatten() for x in values.values()])
    everyone = [torch.empty_like(flat) for _ in range(distributed.world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(x, flat) for x in everyone)
