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
) -> Engine:
    """The engine that the recipe names; see `Engine` for the arguments."""
    if config.kind == "zero1":
        from scale_smog.engine.zero import ZeroEngine

        return ZeroEngine(online, momentum, optimizer, config, batch)
    from scale_smog.engine.ddp import DdpEngine

    return DdpEngine(online, momentum, optimizer, config, batch)
