"""The loop's step against a bare loop: the same two nets and views, and nothing else.

The bare loop is the least that trains two such nets: forward passes, a cosine loss between the
prediction and the momentum net's projection, torch's SGD and a momentum update, both foreach; no
groups, no engine. Ours is the step that training runs: LARS, 3,000 groups, bank and usage counts.
Weights, views, precision and memory format are the same on both sides. A third row is a loop as it
is usually written, solo-learn's among them: contiguous images, timm's LARS, a momentum update one
parameter at a time; still without groups.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from compare import claim, interleaved, parse_arguments
from timm.optim import Lars as TimmLars
from torch import Tensor

from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.loop import train_step
from scale_smog.models import build_nets
from scale_smog.profiling.step_profile import PARTS, StepProfile, Timeline, timed
from scale_smog.profiling.timing import synchronize
from scale_smog.state import build_state
from scale_smog.throughput import FIXED_VALUES, build_batches, timed_methods

FLOOR = 0.92
STEPS_A_TURN = {"cpu": 1, "cuda": 10}


def main() -> None:
    """Prints both times, where ours goes, and the claim."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    recipe = step_recipe(16, 96, width=1) if not arguments.quick else step_recipe(4, 32, width=1)
    with one_rank():
        ours, bare, usual = Ours(recipe, device), Bare(recipe, device), Usual(recipe, device)
        sides = {"our step": turn(ours), "a bare loop": turn(bare), "a usual loop": turn(usual)}
        seconds = interleaved(sides, arguments.repeats * 3)
        print_parts(ours)
    size = f"ResNet-50, {recipe.data.large_px} px, batch {recipe.data.global_batch}, {device.type}"
    num = recipe.data.global_batch * STEPS_A_TURN[device.type]
    text = f"images/s of the whole step against a usual loop without groups, {size}"
    claim(text, num / seconds["our step"], num / seconds["a usual loop"], higher_is_better=True)
    text = f"speed of the whole step as a share of a bare loop's, {size} (at least {FLOOR})"
    claim(text, num / seconds["our step"], num / seconds["a bare loop"], higher_is_better=True)


def step_recipe(batch: int, px: int, width: int, **sections: dict[str, Any]) -> Recipe:
    """The paper's ResNet-50 on one rank with random views; k-means is timed elsewhere."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return Recipe.model_validate(
        {
            "run": {"steps": 1},
            "data": {"path": "", "global_batch": batch, "large_px": px, "loader": "synthetic"},
            "model": {"width": width} | sections.get("model", {}),
            "grouping": {"kmeans": False, "init": "random", "bank_steps": 10},
            "engine": {"precision": precision} | sections.get("engine", {}),
        }
    )


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one, as plain python has it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/x", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def views_of(recipe: Recipe, device: torch.device) -> Batch:
    """The random views that both sides train on."""
    batch = recipe.data.global_batch
    return next(iter(build_batches(recipe, batch, 1, True, device)))


def turn(side: "Ours | Bare") -> Callable[[], None]:
    """Steps that wait for the device at their end only: the host may run ahead, as in training."""

    def run() -> None:
        for _ in range(STEPS_A_TURN[side.device.type]):
            side.step()
        synchronize(side.device)

    return run


class Ours:
    """The loop's own step."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.batch = views_of(recipe, device)
        self.state = build_state(recipe, recipe.data.global_batch, device)

    def step(self) -> None:
        """One of training."""
        train_step(self.state, self.batch, FIXED_VALUES)


class Bare:
    """Two nets, a loss, SGD and a momentum update.

    Args:
        recipe: nets, views and precision.
        device: where they are.
        views_last: views lie channels_last.
        weights_last: so do weights; by default on a GPU, as under `engine.kind=ddp`.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        views_last: bool = True,
        weights_last: bool | None = None,
    ):
        self.device = device
        self.views = views_of(recipe, device).large
        if not views_last:
            self.views = [view.contiguous() for view in self.views]
        torch.manual_seed(0)
        self.online, self.momentum = (net.to(device) for net in build_nets(recipe.model))
        if device.type == "cuda" if weights_last is None else weights_last:
            for net in (self.online, self.momentum):
                net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.is_bf16 = recipe.engine.precision == "bf16"
        self.optimizer = torch.optim.SGD(
            self.online.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-6, foreach=True
        )
        leaders = dict(self.online.named_parameters())
        self.leaders = [leaders[name].detach() for name, _ in self.momentum.named_parameters()]
        self.followers = [p.detach() for p in self.momentum.parameters()]

    def follow(self) -> None:
        """The momentum update."""
        torch._foreach_lerp_(self.followers, self.leaders, 1e-3)

    def step(self) -> None:
        """One of training."""
        view, other = self.views
        self.follow()
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast if self.is_bf16 else nullcontext():
            _, p, _ = self.online(view)  # [1, B, D]
            with torch.no_grad():
                target: Tensor = self.momentum(other)  # [B, D]
        loss = -(p[0] * target).sum(dim=1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Usual(Bare):
    """The same step as it is usually written."""

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, device, views_last=False, weights_last=False)
        rates: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-6}
        self.optimizer = TimmLars(self.online.parameters(), **rates)

    def follow(self) -> None:
        """One parameter after the other."""
        for follower, leader in zip(self.followers, self.leaders, strict=True):
            follower.mul_(0.999).add_(leader, alpha=0.001)


def print_parts(ours: Ours, num_steps: int = 5) -> None:
    """Where a step's time goes."""
    timeline = Timeline(ours.device)
    with timed(timeline, timed_methods(ours.state)):
        for _ in range(num_steps):
            with timeline.step():
                train_step(ours.state, ours.batch, FIXED_VALUES)
    measured = StepProfile.of(timeline.durations())
    for name in PARTS:
        if measured.parts[name]:
            share = measured.parts[name] / measured.step_s
            print(f"    {name:<20}{measured.parts[name] * 1e3:10.2f} ms{share:8.1%}", flush=True)


if __name__ == "__main__":
    main()
