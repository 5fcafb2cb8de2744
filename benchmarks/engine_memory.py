"""Peak memory of a rank and bytes it sends at a step, for each engine, measured and predicted.

Two gloo ranks on this machine train ResNet-50 x4 in float32 on a few small images, so that weights
and not activations are what is measured; hsdp has four, in two nodes, and x2, a quarter of the
weights, because four ranks of x4 take 24 GiB. Memory is the process's own peak in a step, without
what it held before the nets were built; bytes are what the kernel counted the process to have
written. Beside them: the plan's figures for the same ranks, and for x4 on 64 GPUs in nodes of 8.
"""

import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import claim, parse_arguments

from scale_smog.config import Recipe
from scale_smog.engine import Engine, build_engine
from scale_smog.grouping import MomentumGroups
from scale_smog.loss import group_contrastive_loss
from scale_smog.models import build_nets, process_group_for, synchronise_batch_norm
from scale_smog.profiling.memory import plan_memory
from scale_smog.profiling.sharding import shards_of

KINDS = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
RANKS_PER_NODE, BATCH, IMAGE_PX, NUM_GPUS = 2, 2, 64, 64
MIB = 2**20


def main() -> None:
    """Prints one line an engine, and a table."""
    arguments = parse_arguments(__doc__)
    rows = []
    for kind in KINDS:
        num_ranks = 4 if kind == "hsdp" else 2
        width = 1 if arguments.quick else 2 if kind == "hsdp" else 4
        here = recipe(kind, width, num_ranks * BATCH, IMAGE_PX, "fp32")
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (folder, here, num_ranks), nprocs=num_ranks)
            peak, sent = torch.load(Path(folder) / "result.pt")
        there = recipe(kind, 4, NUM_GPUS * 64, 224, "bf16")
        figures = {
            "engine": kind,
            "width": width,
            "peak_mib": round(peak),
            "planned_mib": round(plan_memory(here, num_ranks, RANKS_PER_NODE).total_mib),
            "sent_mib": round(sent),
            "planned_sent_mib": round(sent_mib(here, num_ranks, RANKS_PER_NODE)),
            "gpus_64_mib": round(plan_memory(there, NUM_GPUS).total_mib),
            "gpus_64_sent_mib": round(sent_mib(there, NUM_GPUS)),
        }
        print(json.dumps(figures), flush=True)
        rows.append(figures)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    fsdp = next(row for row in rows if row["engine"] == "fsdp")
    claim("MiB of a rank of fsdp, planned against measured", fsdp["planned_mib"], fsdp["peak_mib"])


def sent_mib(recipe: Recipe, world_size: int, ranks_per_node: int = 8) -> float:
    """MiB that a rank sends at a step for weights and gradients, by the ring algorithms.

    A ring all-reduce of n bytes among r ranks sends 2 n (r - 1) / r from each, an all-gather or a
    reduce-scatter half of it (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """
    with torch.device("meta"):
        nets_of_rank = build_nets(recipe.model, recipe.nets)
    num_online, num_momentum = (sum(p.numel() for p in x.parameters()) for x in nets_of_rank)
    kind = recipe.engine.kind
    weight_bytes = 8 if recipe.engine.precision == "fp64" else 4
    grad_bytes = 2 if recipe.engine.reduce_precision == "bf16" else weight_bytes
    if kind in ("zero2", "zero3"):  # they share the gradients of every micro-batch
        grad_bytes *= recipe.engine.accumulate
    parts = shards_of(kind, world_size, ranks_per_node).weights
    once = (world_size - 1) / world_size
    if parts == 1:  # gradients are summed up and, under ZeRO, new weights sent round
        gathered = num_online * weight_bytes if kind != "ddp" else 0
        return (gathered + 2 * num_online * grad_bytes) * once / MIB
    # Weights are gathered for every forward pass, and once more for the backward pass.
    engine, nets = recipe.engine, recipe.nets
    num_sizes = nets.num_online_views + (1 if recipe.data.num_small_crops else 0)
    num_passes = (engine.num_online_forwards + 1) * num_sizes
    num_values = num_passes * num_online + nets.num_momentum_views * num_momentum
    gathered = engine.accumulate * num_values * weight_bytes
    sent = (gathered + num_online * grad_bytes) * (parts - 1) / parts
    copies = world_size / parts  # hsdp: the nodes' copies add up their parts of the gradients
    sent += 2 * num_online / parts * grad_bytes * (copies - 1) / copies
    return sent / MIB


def recipe(kind: str, width: int, global_batch: int, image_px: int, precision: str) -> Recipe:
    """ResNet-50 of a width, without small crops."""
    return Recipe.model_validate(
        {
            "run": {"steps": 2},
            "data": {"path": "", "global_batch": global_batch, "large_px": image_px},
            "model": {"width": width},
            "grouping": {"init": "random", "kmeans": False},  # two steps fill no bank
            "engine": {"kind": kind, "precision": precision},
        }
    )


def measure(rank: int, folder: str, config: Recipe, num_ranks: int) -> None:
    """Two steps on this rank; the second is measured."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(RANKS_PER_NODE)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=5),
    )
    if config.engine.is_zero:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 (not part of what the nets need)
    before = status_mib("VmRSS")
    engine = build(config)
    groups = MomentumGroups(config.grouping.num_groups, config.model.dim)
    step(engine, groups)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    written = written_bytes()
    step(engine, groups)
    figures = torch.tensor([status_mib("VmHWM") - before, (written_bytes() - written) / MIB])
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(figures.tolist(), Path(folder) / "result.pt")
    dist.destroy_process_group()


def build(config: Recipe) -> Engine:
    """The engine of a recipe."""
    torch.manual_seed(0)
    online, momentum = build_nets(config.model)
    scope = process_group_for("global")
    for net in (online, momentum):
        synchronise_batch_norm(net, scope)
    return build_engine(online, momentum, config.optimizer, config.engine, BATCH)


def step(engine: Engine, groups: MomentumGroups) -> None:
    """What the loop does in a step."""
    views = torch.randn(2, BATCH, 3, IMAGE_PX, IMAGE_PX)
    z, p = engine.forward_online(views[0], [])
    target = groups.assign(engine.forward_momentum(views[1]))
    new_groups = groups.updated_by(z, 0.99)
    engine.backward(group_contrastive_loss(p, new_groups, target, 0.1))
    engine.step(0.1, 1e-6)
    groups.commit(new_groups)
    engine.update_ema(0.999)


def status_mib(name: str) -> float:
    """A figure of the kernel on this process's memory."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) / 1024


def written_bytes() -> int:
    """Bytes that this process has written, to sockets too."""
    line = next(x for x in Path("/proc/self/io").read_text().splitlines() if "wchar" in x)
    return int(line.split()[1])


if __name__ == "__main__":
    main()
