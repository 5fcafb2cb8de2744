"""What every loader yields."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scale_smog.data.augment import View


@dataclass(frozen=True)
class Batch:
    """B samples of one rank at one step, normalised, channels_last.

    Training has two large views; evaluation one.
    """

    large: list[Tensor]  # each [B, 3, H, W] float32: scheme A, scheme B
    small: list[Tensor]  # each [B, 3, h, w] float32
    label: Tensor  # [B] int64; -1: none
    sample_id: Tensor  # [B] int64

    @classmethod
    def from_views(
        cls, kinds: Sequence[View], views: Sequence[Tensor], label: Tensor, sample_id: Tensor
    ) -> "Batch":
        """Sorts `views`, one of each of `kinds`, into large and small ones."""
        pairs = list(zip(kinds, views, strict=True))
        large = [view for kind, view in pairs if not kind.small]
        small = [view for kind, view in pairs if kind.small]
        return cls(large, small, label, sample_id)

    def views(self, swap: bool) -> tuple[Tensor, Tensor]:
        """The online and the momentum net's large view; the schemes change sides with `swap`."""
        scheme_a, scheme_b = self.large
        return (scheme_b, scheme_a) if swap else (scheme_a, scheme_b)
