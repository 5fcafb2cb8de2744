"""How the nets are spread over the ranks."""

from scale_smog.config import EngineConfig, OptimizerConfig
from scale_smog.engine.base import Engine
from scale_smog.models import MomentumNet, OnlineNet

__all__ = ["Engine", "build_engine"]


def build_engine(
    online: OnlineNet,
    momentum: MomentumNet,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    batch: int,
    seed: int = 0,
) -> Engine:
    """The engine that the recipe names; see `Engine` for the arguments."""
    return _engine_class(config.kind)(online, momentum, optimizer, config, batch, seed)


def _engine_class(kind: str) -> type[Engine]:
    # Imported when asked for: deepspeed alone takes seconds.
    if kind == "ddp":
        from scale_smog.engine.ddp import DdpEngine

        return DdpEngine
    if kind in ("fsdp", "hsdp"):
        from scale_smog.engine.fsdp import FsdpEngine

        return FsdpEngine
    from scale_smog.engine.zero import Zero3Engine, ZeroEngine

    return Zero3Engine if kind == "zero3" else ZeroEngine
