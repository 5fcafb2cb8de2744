"""What is done to each stage of a net, whatever the engine: checkpointing and compilation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scale_smog.config import EngineConfig
from scale_smog.models import (
    MomentumNet,
    OnlineNet,
    dropped_as_now,
    frozen_running_stats,
    stages,
)
from scale_smog.models.sync_batch_norm import SynchronisedBatchNorm

MOST_COMPILATIONS = 64  # of a stage's code: stages of two nets, two sizes of views, two modes


def prepare_stages(online: OnlineNet, momentum: MomentumNet, config: EngineConfig) -> None:
    """Compiles and checkpoints, in place, what the recipe says; before an engine wraps the nets.

    A stage's `forward` is replaced and not the stage: parameters keep their names, and the hooks
    by which engines gather weights run outside the compiled code and before a recomputation.
    """
    if config.compile:
        # All stages are one piece of code to the compiler, which gives up on it after eight sizes.
        torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
        for net in (online, momentum):
            for module in net.modules():
                if isinstance(module, SynchronisedBatchNorm) and module.process_group is not None:
                    # What lies between two of them is compiled.
                    module.forward = torch.compiler.disable(module.forward)  # pyright: ignore
            for stage in stages(net.backbone):
                stage.forward = torch.compile(stage.forward)
    if config.activation_checkpointing:
        for stage in stages(online.backbone):
            stage.forward = partial(
                checkpoint,
                stage.forward,
                use_reentrant=False,
                preserve_rng_state=False,  # what is dropped is no draw of torch's
                context_fn=partial(_contexts, stage),
            )


def _contexts(
    stage: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass and around its repetition, which must not count a batch twice.

    The repetition drops the paths of the pass that is repeated; other views may have passed since.
    """
    return nullcontext(), _repeated(stage, dropped_as_now(stage))


@contextmanager
def _repeated(stage: nn.Module, paths: AbstractContextManager[None]) -> Iterator[None]:
    with frozen_running_stats(stage), paths:
        yield
