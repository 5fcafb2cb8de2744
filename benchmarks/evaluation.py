"""What evaluation costs: eight learning rates against one, and online classifiers against none.

The linear evaluation's step is a frozen forward pass of the backbone and a step of the heads; eight
heads may cost at most 1.3 of one. The online kNN and linear classifier may cost 2 % of a step.
"""

import time

import torch
import torch.nn.functional as F
from compare import claim, interleaved, parse_arguments
from torch import nn

from scale_smog.evaluation.online import KNN_EVERY, QUEUE_ROWS, OnlineProbe
from scale_smog.evaluation.protocols import LinearConfig
from scale_smog.evaluation.supervised.linear import build_heads
from scale_smog.models import build_backbone

NUM_CLASSES = 10
RATES = LinearConfig().learning_rates


def linear_step(backbone: nn.Module, images: torch.Tensor, rates: tuple[float, ...]):
    """One step of the linear evaluation with a head for each rate."""
    config = LinearConfig(learning_rates=rates, batch=len(images))
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    heads, optimizer = build_heads(config, num_features, NUM_CLASSES, images.device)
    labels = torch.arange(len(images)) % NUM_CLASSES

    def step() -> None:
        with torch.no_grad():
            features = backbone(images)
        scores = heads(features)  # [B, L, C]
        wanted = labels[:, None].expand(scores.shape[:2])
        loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten()) * len(rates)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def online_seconds(num_features: int, batch: int, num_steps: int) -> float:
    """Seconds a step of the online classifiers, the queue full: their own work, timed alone."""
    probe = OnlineProbe(num_features, NUM_CLASSES, torch.device("cpu"))
    features, labels = torch.randn(batch, num_features), torch.arange(batch) % NUM_CLASSES
    for step in range(QUEUE_ROWS // batch + 1):
        probe.update(step, features, labels)
    start = time.perf_counter()
    for step in range(num_steps):
        probe.update(step, features, labels)
        if step % KNN_EVERY == 0:
            probe.accuracies()
    return (time.perf_counter() - start) / num_steps


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    backbone = build_backbone("resnet_tiny" if arguments.quick else "resnet18")
    px = 32 if arguments.quick else 64
    images = torch.randn(128, 3, px, px).contiguous(memory_format=torch.channels_last)
    backbone.eval()
    seconds = interleaved(
        {
            "one learning rate": linear_step(backbone, images, RATES[4:5]),
            "eight learning rates": linear_step(backbone, images, RATES),
        },
        3 * arguments.repeats,
    )
    one, eight = seconds["one learning rate"], seconds["eight learning rates"]
    claim("a linear step with eight learning rates, against 1.3 of one with one", eight, 1.3 * one)

    online = backbone.train()

    def training_step() -> None:
        """Half of SMoG's: one net, one view, forward and backward."""
        online(images).square().mean().backward()

    step = interleaved({"half a training step": training_step}, arguments.repeats)
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    own = online_seconds(num_features, len(images), 4 * KNN_EVERY)
    limit = 0.02 * 2 * step["half a training step"]
    claim("the online classifiers' seconds, against 2 % of a training step", own, limit)


if __name__ == "__main__":
    main()
