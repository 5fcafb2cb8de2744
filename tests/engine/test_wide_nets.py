"""Real nets on the engines that split them."""

import os
from copy import deepcopy

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import EngineConfig, ModelConfig, OptimizerConfig
from scale_smog.engine import Engine, build_engine
from scale_smog.grouping import MomentumGroups
from scale_smog.loss import group_contrastive_loss
from scale_smog.models import (
    build_nets,
    process_group_for,
    synchronise_batch_norm,
)

DIM, NUM_GROUPS = 16, 10


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


def losses_by_engine(model: ModelConfig) -> dict[str, list[float]]:
    os.environ["LOCAL_RANK"] = str(distributed.rank())
    torch.manual_seed(0)
    nets = build_nets(model)  # weights are drawn once: the wide net takes seconds
    torch.manual_seed(distributed.rank())
    views = list(torch.randn(2, 2, 3, 96, 96))
    losses = {}
    for kind in ("ddp", "zero2", "zero3", "fsdp"):
        online, momentum = (synchronised(deepcopy(net)) for net in nets)
        config = EngineConfig.model_validate({"kind": kind, "precision": "fp32"})
        losses[kind] = step(build_engine(online, momentum, OptimizerConfig(), config, 2), views)
    return losses


def synchronised(net):
    return synchronise_batch_norm(net, process_group_for("global"))


@pytest.mark.parametrize(("backbone", "width"), [("swin_tiny", 1), ("resnet50", 2)])
def test_a_step_of_a_real_net_has_the_losses_of_ddp(backbone, width):
    model = ModelConfig(backbone=backbone, width=width, head_width=64, dim=DIM)
    for losses in run_on_ranks(2, losses_by_engine, model):
        for kind in ("zero2", "zero3", "fsdp"):
            (loss, later), (of_ddp, later_of_ddp) = losses[kind], losses["ddp"]
            assert loss == pytest.approx(of_ddp, rel=1e-6), kind
            # Batch norm over four images makes more of float32's rounding.
            assert later == pytest.approx(later_of_ddp, rel=1e-4), kind
            assert abs(later - loss) > 1e-3 * loss
