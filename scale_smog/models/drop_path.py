"""Drop path: in training an image leaves out some of the net's blocks (stochastic depth).

Huang et al., ECCV 2016; rates grow linearly with depth, and what is kept is scaled up, as in timm.
Who leaves out what is a pure function of (seed, step, view, image of the global batch, block): a
step can be repeated, on any number of ranks and after any checkpoint.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from scale_smog.counter_rng import DROP_PATH, uniforms
from scale_smog.errors import UserError

# Shapes: L residual branches, V views, B images per rank, N images that pass together.


class DropPath(nn.Module):
    """The end of a residual branch: scales each image's output by 0 or by 1 / (1 - rate).

    Args:
        rate: probability that an image leaves the branch out.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors: Tensor | None = None  # [N], of `dropped`; None: nothing is left out

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] to the same shape and type."""
        if self.factors is None:
            return x
        if len(x) != len(self.factors):
            raise UserError("model.drop_path: this backbone would drop parts of images: take 0")
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """For `print`."""
        return f"rate={self.rate:.3f}"


def drop_paths(net: nn.Module) -> list[DropPath]:
    """Those of a net, in the order of its modules."""
    return [module for module in net.modules() if isinstance(module, DropPath)]


def draw_factors(
    rates: Sequence[float], seed: int, step: int, images: range, num_views: int
) -> Tensor:
    """What the branches' outputs are multiplied by at a step.

    Args:
        rates: of the L branches.
        seed: of the run.
        step: finished steps.
        images: this rank's, by their place in the global batch; B of them.
        num_views: V.

    Returns:
        [L, V, B] float64: 0 or 1 / (1 - rate), 1 on average.
    """
    rows, steps = np.array(images), np.full(len(images), step)
    drawn = [  # [B, L] each
        uniforms(seed, rows, steps, DROP_PATH + view, len(rates)) for view in range(num_views)
    ]
    rate = np.array(rates)
    factors = (np.stack(drawn) >= rate) / (1 - rate)  # [V, B, L]
    return torch.from_numpy(factors).permute(2, 0, 1).contiguous()


@contextmanager
def dropped(paths: Sequence[DropPath], factors: Sequence[Tensor | None]) -> Iterator[None]:
    """Leaves out branches in forward passes within.

    Args:
        paths: the L branches.
        factors: of each [N], for the images in the order in which they pass; None: nothing.
    """
    for path, own in zip(paths, factors, strict=True):
        path.factors = own
    try:
        yield
    finally:
        for path in paths:
            path.factors = None


def dropped_as_now(net: nn.Module) -> AbstractContextManager[None]:
    """Leaves out once more what is left out at the time of this call."""
    paths = drop_paths(net)
    return dropped(paths, [path.factors for path in paths])
