"""Over how many ranks each engine splits what a rank would otherwise hold."""

from typing import NamedTuple


class Shards(NamedTuple):
    """Ranks that share one copy; 1: each holds all of it."""

    optimizer: int
    gradients: int
    weights: int


def shards_of(engine: str, world_size: int, ranks_per_node: int) -> Shards:
    """What `engine.kind` splits on `world_size` ranks."""
    per_node = min(ranks_per_node, world_size)
    return {
        "ddp": Shards(1, 1, 1),
        "zero1": Shards(world_size, 1, 1),
        "zero2": Shards(world_size, world_size, 1),
        "zero3": Shards(world_size, world_size, world_size),
        "fsdp": Shards(world_size, world_size, world_size),
        "hsdp": Shards(per_node, per_node, per_node),
    }[engine]
