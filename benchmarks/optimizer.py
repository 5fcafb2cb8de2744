"""LARS and momentum update of ResNet-50's tensors: ours against timm's LARS and a loop.

The other side is what one writes by hand: timm's optimizer as it comes, and one line a parameter
for the momentum net. Both start from the same weights and gradients and must end alike. The floor
is a copy that moves what any such step must: weights, gradients, momentum and momentum net read
once, all but the gradients written once. LARS reads weights and gradients a second time: it needs
their norms first.
"""

from typing import Any

import torch
from compare import claim, interleaved, parse_arguments
from timm.optim import Lars as TimmLars
from torch import nn

from scale_smog.config import EngineConfig, ModelConfig, OptimizerConfig
from scale_smog.engine import build_engine
from scale_smog.models import build_nets

FLOOR = 1.5
BYTES_A_WEIGHT = 28  # float32: four read, three written
ALPHA, LR, DECAY, MOMENTUM = 0.999, 1.0, 1e-6, 0.9


def main() -> None:
    """Prints the two times and the claim."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = "resnet18" if arguments.quick else "resnet50"
    model = ModelConfig(backbone=backbone, head_width=16, dim=16)
    torch.manual_seed(0)
    ours, theirs = Ours(model, device), Theirs(model, device)
    theirs.online.load_state_dict(ours.online.state_dict())
    theirs.momentum.load_state_dict(ours.momentum.state_dict())
    gradients = [torch.randn_like(p) * 1e-3 for p in ours.online.parameters()]
    # Ours leaves the scaled gradients; LARS makes the same update of them again.
    of_side = {ours: gradients, theirs: [gradient.clone() for gradient in gradients]}

    def step(side: "Ours | Theirs") -> None:
        for p, gradient in zip(side.online.parameters(), of_side[side], strict=True):
            p.grad = gradient
        side.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    source = torch.randn(BYTES_A_WEIGHT * num_weights(ours) // 8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    sides = {
        "LARS and momentum update": lambda: step(ours),
        "timm's LARS and a loop": lambda: step(theirs),
        "as many bytes copied": copy,
    }
    own, peer, floor = interleaved(sides, arguments.repeats * 3).values()
    for mine, other in zip(ours.momentum.parameters(), theirs.momentum.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    where = f"{backbone}, {device.type}, {arguments.threads} threads"
    claim(f"seconds of LARS and momentum update, {where} (at least {FLOOR})", own, peer)
    claim(f"share of the memory's floor of LARS and momentum update, {where}", own, floor)


def num_weights(side: "Ours | Theirs") -> int:
    """Trained ones."""
    return sum(p.numel() for p in side.online.parameters())


class Ours:
    """The engine's own step and momentum update."""

    def __init__(self, model: ModelConfig, device: torch.device):
        online, momentum = build_nets(model)
        self.online, self.momentum = online.to(device), momentum.to(device)
        optimizer = OptimizerConfig(name="lars", momentum=MOMENTUM)
        config = EngineConfig(precision="fp32")
        self._engine = build_engine(self.online, self.momentum, optimizer, config, batch=1)

    def step(self) -> None:
        """One of each."""
        self._engine.step(LR, DECAY)
        self._engine.update_ema(ALPHA)


class Theirs:
    """timm's LARS, biases and norms apart, and a loop over the parameters."""

    def __init__(self, model: ModelConfig, device: torch.device):
        self.online, self.momentum = (net.to(device) for net in build_nets(model))
        adapted = [p for p in self.online.parameters() if p.dim() > 1]
        excluded = [p for p in self.online.parameters() if p.dim() <= 1]
        groups = [{"params": adapted}, {"params": excluded, "weight_decay": 0.0}]
        rates: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
        self._optimizer = TimmLars(groups, **rates)
        leaders = dict(self.online.named_parameters())
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = [
            (p, leaders[name]) for name, p in self.momentum.named_parameters()
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One of each."""
        self._optimizer.step()
        for follower, leader in self._pairs:
            follower.mul_(ALPHA).add_(leader, alpha=1 - ALPHA)


if __name__ == "__main__":
    main()
