"""How the groups are used over the last steps: counts and perplexity."""

import torch
from torch import Tensor

from scale_smog.distributed import Partition


class GroupUsage:
    """Counts of features a group over the last steps.

    Args:
        num_groups: K.
        num_steps: window; 40 steps of the paper's recipe hold 55 features a group.
        device: where the counts live.
    """

    def __init__(self, num_groups: int, device: torch.device, num_steps: int = 40):
        self._window = torch.zeros(num_steps, num_groups, dtype=torch.int32, device=device)
        self._num_pushed = 0

    def push(self, counts: Tensor) -> None:
        """Adds one step's global counts [K]."""
        self._window[self._num_pushed % len(self._window)] = counts
        self._num_pushed += 1

    def counts(self) -> Tensor:
        """Features a group over the window: [K] int64."""
        return self._window.sum(dim=0)

    def state_dict(self) -> dict[str, Partition]:
        """The window, the same on every rank, and the number of pushes."""
        num_pushed = torch.tensor(self._num_pushed)
        return {
            "window": Partition.replicated(self._window),
            "num_pushed": Partition.replicated(num_pushed),
        }

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Takes the values of `state_dict`."""
        self._window.copy_(values["window"])
        self._num_pushed = int(values["num_pushed"])


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the usage [K]: K when all groups are used alike, 1 after a collapse."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.exp(torch.special.entr(share).sum()).item()
