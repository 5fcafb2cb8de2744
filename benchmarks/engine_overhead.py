"""A step of each engine on one rank against a bare loop of the same net, batch and mathematics.

The bare loop is what one writes for one device: the two nets, the groups, the loss, LARS and the
momentum update, without an engine. All contestants take turns in one process.

What an engine costs grows with the weights, what it serves with the images. A recipe gives a GPU 64
images of 224 px; here it is 16, so an engine weighs four times what it does there.
"""

import os
import tempfile
from copy import deepcopy

import torch
import torch.distributed as dist
from compare import claim, interleaved, parse_arguments
from torch import Tensor

from scale_smog.config import EngineConfig, ModelConfig, OptimizerConfig
from scale_smog.engine import Engine, build_engine
from scale_smog.grouping import MomentumGroups
from scale_smog.loss import group_contrastive_loss
from scale_smog.models import MomentumNet, OnlineNet, build_nets
from scale_smog.optim import Lars

MODEL = ModelConfig(backbone="resnet18", head_width=512)
NUM_GROUPS, ALPHA, BETA, LR, DECAY = 300, 0.99, 0.99, 0.1, 1e-6
FLOORS = {"ddp": 0.95, "zero1": 0.90, "fsdp": 0.90}


def main() -> None:
    """Prints the times and a claim an engine: its speed as a share of the bare loop's."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    batch, image_px = (8, 32) if arguments.quick else (16, 224)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/x", rank=0, world_size=1)
        torch.manual_seed(0)
        online, momentum = build_nets(MODEL)
        views = torch.randn(2, batch, 3, image_px, image_px)
        views = [x.contiguous(memory_format=torch.channels_last) for x in views]
        contestants = {"bare": Bare(deepcopy(online), deepcopy(momentum))}
        contestants |= {
            kind: Engined(kind, deepcopy(online), deepcopy(momentum), batch) for kind in FLOORS
        }
        calls = {name: lambda side=side: side.step(*views) for name, side in contestants.items()}
        seconds = interleaved(calls, arguments.repeats * 3)
        for kind, floor in FLOORS.items():
            text = (
                f"images/s of {kind} on one rank as a share of the bare loop's (at least {floor})"
            )
            claim(text, batch / seconds[kind], batch / seconds["bare"], higher_is_better=True)
        dist.destroy_process_group()


class Bare:
    """One device, no engine."""

    def __init__(self, online: OnlineNet, momentum: MomentumNet):
        self.online, self.momentum = online, momentum
        self.groups = MomentumGroups(NUM_GROUPS, MODEL.dim)
        parameters = list(online.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() <= 1], "use_trust_ratio": False},
        ]
        self.optimizer = Lars(groups, LR)
        leaders = dict(online.named_parameters())
        self.leaders = [leaders[name].detach() for name, _ in momentum.named_parameters()]
        self.followers = [p.detach() for p in momentum.parameters()]

    def step(self, view: Tensor, other: Tensor) -> None:
        """One training step."""
        with torch.no_grad():
            torch._foreach_lerp_(self.followers, self.leaders, 1 - ALPHA)
            momentum_z = self.momentum(other)
        z, p, _ = self.online(view)
        target, new_groups = self.groups.assign(momentum_z), self.groups.updated_by(z, BETA)
        group_contrastive_loss(p, new_groups, target, 0.1).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.groups.commit(new_groups)


class Engined:
    """The same through an engine."""

    def __init__(self, kind: str, online: OnlineNet, momentum: MomentumNet, batch: int):
        config = EngineConfig.model_validate({"kind": kind, "precision": "fp32"})
        self.engine: Engine = build_engine(online, momentum, OptimizerConfig(), config, batch)
        self.groups = MomentumGroups(NUM_GROUPS, MODEL.dim)

    def step(self, view: Tensor, other: Tensor) -> None:
        """One training step, in the loop's order."""
        z, p = self.engine.forward_online(view, [])
        target = self.groups.assign(self.engine.forward_momentum(other))
        new_groups = self.groups.updated_by(z, BETA)
        self.engine.backward(group_contrastive_loss(p, new_groups, target, 0.1))
        self.engine.step(LR, DECAY)
        self.groups.commit(new_groups)
        self.engine.update_ema(ALPHA)


if __name__ == "__main__":
    main()
