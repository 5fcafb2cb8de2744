"""One rank of many on a pretended GPU: builds the state, steps, and says what it cost.

LD_PRELOAD=... python -m scale_smog.rehearsal.rank REQUEST.json REPORT.json
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.rehearsal.operations import Collective, Operations

# The first step makes the optimizer's state, the second DDP's buckets anew; the last one counts.
NUM_STEPS = {"ddp": 3}


@dataclass
class RankReport:
    """What one step of a rank asks of its GPU and of the other ranks."""

    problem: str = ""  # why it does not step
    kernels: int = 0  # launched, those of matrix products and convolutions among them
    copies: int = 0
    waits: dict[str, int] = field(default_factory=dict)  # of the host, by file and line
    collectives: list[Collective] = field(default_factory=list)  # in their order
    peak_mib: float = 0.0  # of torch's allocator, over all steps

    @property
    def num_launches(self) -> int:
        """All that the host starts on its own GPU."""
        return self.kernels + self.copies

    @property
    def num_waits(self) -> int:
        """Of the host for its GPU."""
        return sum(self.waits.values())

    @property
    def sent_mib(self) -> float:
        """That the rank sends at a step."""
        return sum(x.sent_bytes for x in self.collectives) / 2**20

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Of `asdict`."""
        values = json.loads(text)
        values["collectives"] = [Collective(*x) for x in values["collectives"]]
        return cls(**values)


def rehearse_rank(recipe: Recipe, rank: int, ranks: int, ranks_per_node: int) -> RankReport:
    """Steps as rank `rank` of `ranks`, in a process on the pretended runtime.

    Raises:
        UserError: a setting does not fit the number of ranks.
        RuntimeError: what a GPU would refuse: tensors of two devices, shapes, strides.
    """
    from scale_smog.data.plan import images_per_rank
    from scale_smog.engine.graphed import NUM_WARM_UPS
    from scale_smog.loop import train_step
    from scale_smog.state import build_state
    from scale_smog.throughput import (
        FIXED_VALUES,
        build_batches,
        without_resets,
    )

    device = _join(rank, ranks, ranks_per_node)
    batch = images_per_rank(recipe.data.global_batch, ranks)
    with Operations() as operations, _without_other_ranks(recipe.engine.kind):
        state = build_state(without_resets(recipe), batch, device)
        state.step = 1  # a method may begin its first one with k-means
        torch.cuda.reset_peak_memory_stats()
        num_steps = NUM_STEPS.get(recipe.engine.kind, 2)
        if recipe.engine.cuda_graphs:
            num_steps = NUM_WARM_UPS + 2
        for views in build_batches(recipe, batch, num_steps, True, device):
            operations.clear()
            with operations.watching_for_waits():
                train_step(state, views, FIXED_VALUES)
        counts = operations.counts
    return RankReport(
        kernels=counts["kernels"] + operations.num_products,
        copies=counts["copies"],
        waits=dict(operations.waits),
        collectives=operations.collectives,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20,
    )


def _join(rank: int, ranks: int, ranks_per_node: int) -> torch.device:
    """A process group whose other ranks are never asked."""
    local = {"LOCAL_RANK": rank % ranks_per_node, "LOCAL_WORLD_SIZE": ranks_per_node}
    names = {"RANK": rank, "WORLD_SIZE": ranks, **local}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    device = torch.device("cuda", local["LOCAL_RANK"])
    torch.cuda.set_device(device)
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    return device


class _RehearsedDdp(DistributedDataParallel):
    """Its reducer asks the collective's future for a result, which that of no rank has."""

    is_bf16 = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        super().register_comm_hook(None, self._reduce)

    def register_comm_hook(self, state: object, hook: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.is_bf16 = hook is bf16_compress_hook

    def _reduce(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        sent = gradients.bfloat16() if self.is_bf16 else gradients
        sent.div_(dist.get_world_size())
        dist.all_reduce(sent)
        if self.is_bf16:
            gradients.copy_(sent)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(gradients)
        return future


@contextmanager
def _without_other_ranks(kind: str) -> Iterator[None]:
    """Leaves out what libraries read from other ranks to compare it with their own."""
    patches: dict[str, Any] = {
        "torch.nn.parallel.distributed._verify_param_shape_across_processes": _nothing,
        "scale_smog.engine.ddp.DistributedDataParallel": _RehearsedDdp,
    }
    if kind == "zero3":
        for module in ("partitioned_param_coordinator", "partition_parameters"):
            name = f"deepspeed.runtime.zero.{module}.assert_ints_same_as_other_ranks"
            patches[name] = _nothing
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        yield


def _nothing(*_: object, **__: object) -> None:
    pass


def main() -> None:
    """Reads the request, writes the report."""
    request = json.loads(Path(sys.argv[1]).read_text())
    recipe = Recipe.model_validate(request.pop("recipe"))
    try:
        report = rehearse_rank(recipe, **request)
    except (UserError, RuntimeError) as error:
        report = RankReport(problem=str(error).splitlines()[0])
        if isinstance(error, RuntimeError):
            import traceback

            traceback.print_exc()
    Path(sys.argv[2]).write_text(json.dumps(asdict(report)))
    os._exit(0)  # threads of libraries may outlive the interpreter


if __name__ == "__main__":
    main()
