"""Random batches of the right shape and place, to measure everything but the loading."""

from collections.abc import Iterator, Sequence

import torch

from scale_smog.data.augment import View
from scale_smog.data.batch import Batch


class SyntheticLoader:
    """The same B random samples at every step, made once.

    Args:
        views: kinds of views, for their sizes.
        batch: samples of this rank, B.
        num_steps: batches to yield.
        device: where the batches live.
    """

    def __init__(self, views: Sequence[View], batch: int, num_steps: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        shapes = [(batch, 3, view.px, view.px) for view in views]
        tensors = [
            torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last)
            for shape in shapes
        ]
        label = torch.full((batch,), -1, device=device)
        self._batch = Batch.from_views(views, tensors, label, torch.arange(batch))
        self._num_steps = num_steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._num_steps):
            yield self._batch
