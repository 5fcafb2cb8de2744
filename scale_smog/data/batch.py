"""What every loader yields."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one rank at one step, normalised, channels_last.

    Training has two large views; evaluation one.
    """

    large: list[Tensor]  # each [B, 3, H, W] float32: scheme A, scheme B
    small: list[Tensor]  # each [B, 3, h, w] float32
    label: Tensor  # [B] int64; -1: none
    sample_id: Tensor  # [B] int64

    def views(self, swap: bool) -> tuple[Tensor, Tensor]:
        """The online and the momentum net's large view; the schemes change sides with `swap`."""
        scheme_a, scheme_b = self.large
        return (scheme_b, scheme_a) if swap else (scheme_a, scheme_b)
