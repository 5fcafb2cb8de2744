"""The online features of the last steps, each rank keeping its own slice."""

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.distributed import Partition


class FeatureBank:
    """A ring of the features of the last `num_steps` steps.

    Rows are numbered globally (step in the ring, then rank, then image), so what is drawn by
    number does not depend on the number of ranks.

    Args:
        num_steps: S, steps kept.
        batch: B, images of a step on this rank, equal on all ranks.
        dim: D.
        device: where the ring lives.
    """

    def __init__(self, num_steps: int, batch: int, dim: int, device: torch.device):
        self._ring = torch.zeros(num_steps, batch, dim, device=device)  # [S, B, D] float32
        self._num_pushed = 0

    def push(self, z: Tensor) -> None:
        """Stores features [B, D], over the oldest ones."""
        self._ring[self._num_pushed % len(self._ring)] = z.detach()
        self._num_pushed += 1

    def features(self) -> Tensor:
        """What has been stored: [N, D] float32, N = B x min(steps pushed, S)."""
        return self._ring[: self._num_pushed].flatten(0, 1)

    def own_rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The row of `features` for each global number [K], and whether this rank has it [K]."""
        batch = self._ring.shape[1]
        size = batch * distributed.world_size()
        step, image = numbers // size, numbers % size  # image of the global batch
        return step * batch + image % batch, image // batch == distributed.rank()

    def state_dict(self) -> dict[str, Partition]:
        """The ring of all ranks [global batch, S, D] and the number of pushes."""
        ring = Partition.from_rows(self._ring.transpose(0, 1))  # this rank's [B, S, D]
        return {"ring": ring, "num_pushed": Partition.replicated(torch.tensor(self._num_pushed))}

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Takes this rank's values of `state_dict`."""
        self._ring.copy_(values["ring"].transpose(0, 1))
        self._num_pushed = int(values["num_pushed"])
