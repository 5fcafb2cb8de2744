"""A real net on the engines that split it, and one that a single rank cannot hold."""

import os
import resource
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.config import EngineConfig, ModelConfig, OptimizerConfig
from scale_smog.engine import Engine, build_engine, zero
from scale_smog.grouping import MomentumGroups
from scale_smog.loss import group_contrastive_loss
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    build_nets,
    process_group_for,
    synchronise_batch_norm,
)

DIM, NUM_GROUPS = 16, 10
MODEL = ModelConfig(backbone="resnet50", head_width=64, dim=DIM)
BUCKET_NUMEL = 5_000_000  # gradients of ResNet-50 fill five, as those of its widest fill eight
WIDTH, NUM_LAYERS = 3072, 6  # 216 MiB; with gradients, optimizer state and momentum net 864 MiB
LIMIT_MIB = 675  # sharded over two ranks: 432 MiB and a layer on its way


def step(engine: Engine, views: list[Tensor]) -> list[float]:
    """Losses of the global batch before and after one step on it."""
    groups = MomentumGroups(NUM_GROUPS, DIM)
    target = groups.assign(engine.forward_momentum(views[1]))
    z, p = engine.forward_online(views[0], [])
    new_groups = groups.updated_by(z, beta=0.9)
    loss = group_contrastive_loss(p, new_groups, target, temperature=0.5)
    engine.backward(loss)
    engine.step(0.1, 1e-4)
    with torch.no_grad():
        _, p = engine.forward_online(views[0], [])
        later = group_contrastive_loss(p, new_groups, target, temperature=0.5)
    sums = [distributed.all_reduce(x.detach().clone()) for x in (loss, later)]
    return [x.item() / distributed.world_size() for x in sums]


def losses_by_engine() -> dict[str, list[float]]:
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    zero.ZERO_BUCKET_NUMEL = BUCKET_NUMEL
    torch.manual_seed(0)
    nets = build_nets(MODEL)  # weights are drawn once: that takes seconds
    torch.manual_seed(distributed.rank())
    views = list(torch.randn(2, 2, 3, 64, 64))
    losses = {}
    for kind in ("ddp", "zero2", "zero3", "fsdp"):
        online, momentum = (synchronised(deepcopy(net)) for net in nets)
        config = EngineConfig.model_validate({"kind": kind, "precision": "fp32"})
        losses[kind] = step(build_engine(online, momentum, OptimizerConfig(), config, 2), views)
    return losses


def synchronised(net):
    return synchronise_batch_norm(net, process_group_for("global"))


def test_a_step_of_a_real_net_has_the_losses_of_ddp():
    for losses in run_on_ranks(2, losses_by_engine):
        loss_of_ddp, later_of_ddp = losses.pop("ddp")
        for kind, (loss, later) in losses.items():
            assert loss == pytest.approx(loss_of_ddp, rel=1e-6), kind
            # Batch norm over four images makes more of float32's rounding.
            assert later == pytest.approx(later_of_ddp, rel=1e-4), kind
            assert abs(later - loss) > 1e-3 * loss


class DeepNet(nn.Module):
    """Layers of 36 MiB each, of which every one is a stage.

    glibc gives blocks of more than 32 MiB back at once; smaller ones leave gaps, which count too.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, WIDTH]
        x = images.flatten(1)[:, :WIDTH]
        for block in self.blocks:
            x = F.gelu(block(x))
        return x


def train_a_deep_net(kind: str, num_layers: int) -> None:
    torch.manual_seed(0)
    online = OnlineNet(DeepNet(num_layers), nn.Linear(WIDTH, DIM), nn.Linear(DIM, DIM))
    momentum = MomentumNet(deepcopy(online.backbone), deepcopy(online.projector))
    config = EngineConfig.model_validate({"kind": kind, "precision": "fp32"})
    engine = build_engine(online, momentum, OptimizerConfig(), config, 2)
    step(engine, list(torch.randn(2, 2, 3, 40, 40)))


def train_within_the_limit(kind: str) -> str:
    """Trains with no more memory than `LIMIT_MIB` beyond what a net of one layer needs."""
    os.environ["LOCAL_WORLD_SIZE"] = str(distributed.world_size())
    train_a_deep_net(kind, num_layers=1)  # the libraries' own share
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    limit = held + LIMIT_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        train_a_deep_net(kind, NUM_LAYERS)
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_two_ranks_share_a_net_that_one_cannot_hold():
    assert "allocate memory" in run_on_ranks(1, train_within_the_limit, "ddp")[0]
    assert run_on_ranks(2, train_within_the_limit, "fsdp") == ["trained"] * 2
