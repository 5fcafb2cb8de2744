"""All checks of a recipe on all ranks, and the quick part that every run begins with."""

import hashlib
import json
import os
import socket
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scale_smog import distributed
from scale_smog.checkpoint.disk_space import probe_space
from scale_smog.config import DataConfig, Recipe
from scale_smog.data.datasets import open_split
from scale_smog.data.plan import images_per_rank
from scale_smog.data.remote.space import use_cache
from scale_smog.data.workers import describe_workers, num_usable_cores, workers_of_rank
from scale_smog.errors import UserError, first_few
from scale_smog.preflight import dataset, versions
from scale_smog.preflight.libraries import check_libraries
from scale_smog.preflight.network import check_collectives, check_links
from scale_smog.preflight.table import Row, by_host, format_table, most_agreed, most_common
from scale_smog.profiling.hardware import hardware_name, load_hardware
from scale_smog.profiling.memory import MIB, plan_memory
from scale_smog.runtime.stores import is_url, shown
from scale_smog.small_data import fit_to_data

# A cold shared file system takes minutes to give 64 ranks their libraries.
RENDEZVOUS_TIMEOUT_S = 300.0
READING_TIMEOUT = timedelta(days=1)  # all of a dataset, on the host where that is slowest
MAX_CLOCK_OFFSET_S = 2.0
# A host may have its own of these; contents are compared, or rank 0's are taken.
HOST_KEYS = {("data", "path"), ("data", "workers"), ("run", "dir"), ("model", "weights")}
HOST_KEYS |= {("data", "cache_dir"), ("data", "cache_gib")}
MAX_MEMORY_SHARE = 0.9  # of a device's memory


class Hosts(NamedTuple):
    """All of them, in the order of their first ranks."""

    names: list[str]
    leaders: list[int]  # first rank of each
    num_ranks: list[int]  # of each
    are_in_order: bool  # the ranks of a host follow one another


def check(recipe: Recipe) -> int:
    """Checks a recipe on all ranks and prints a table; returns the exit status, 0 or 2.

    Raises:
        UserError: the ranks do not find one another; settings of a small set do not fit it.
    """
    with distributed.process_group(RENDEZVOUS_TIMEOUT_S) as device:
        use_cache(recipe.data.cache_dir, recipe.data.cache_gib)
        readers = distributed.background_group(READING_TIMEOUT)
        rows = examine(as_trained(recipe, readers), device, readers)
        num_faults = sum(len(row.faults) for row in rows)
        if distributed.is_main():
            outcome = f"{num_faults} fault(s)" if num_faults else "ready to train"
            print(f"{format_table(rows)}\n{outcome}", flush=True)
        return 2 if num_faults else 0


def as_trained(recipe: Recipe, readers: dist.ProcessGroup | None = None) -> Recipe:
    """With the number of images, and what follows from it, if the first rank finds the dataset.

    Args:
        recipe: as read.
        readers: the group in which ranks wait while one reads.
    """
    num_images = 0
    if distributed.is_main():
        with suppress(UserError, OSError):  # the dataset's own row will say it
            num_images = open_split(recipe.data.path, "train").num_samples
    num_images = distributed.gather_objects(num_images, readers)[0]
    return fit_to_data(recipe, num_images)[0] if num_images else recipe


def examine(recipe: Recipe, device: torch.device, readers: dist.ProcessGroup | None) -> list[Row]:
    """Every check, on all ranks; the same rows on each. `readers` as of `as_trained`."""
    hosts = find_hosts()
    name = hardware_name(device)
    machine = load_hardware(name) if name else None
    if machine:  # of which the job may have fewer
        machine = machine.model_copy(update={"gpus_per_node": distributed.ranks_per_node()})
    return [
        check_nodes(hosts, _has_groups_of_nodes(recipe)),
        check_recipes(recipe),
        *check_hosts(recipe, hosts, True, readers),
        check_libraries(recipe.data, device),
        check_clocks(hosts),
        check_run_folder(recipe),
        check_memory(recipe, device),
        check_workers(recipe.data),
        check_links(hosts.names, hosts.leaders, device, machine),
        check_collectives(recipe, device, machine),
    ]


def require_equal_hosts(recipe: Recipe) -> None:
    """The quick part: the same settings, software and dataset on every host.

    Raises:
        UserError: on every rank; names the hosts.
    """
    if distributed.world_size() == 1:
        return
    hosts = find_hosts()
    rows = [check_recipes(recipe), *check_hosts(recipe, hosts, thorough=False)]
    if _has_groups_of_nodes(recipe):
        rows.append(check_nodes(hosts, must_be_in_order=True))
    faults = [fault for row in rows for fault in row.faults]
    if faults:
        raise UserError(f"{'; '.join(faults)} (launcher/check.py looks at everything)")


def find_hosts() -> Hosts:
    """A collective."""
    names = distributed.gather_objects(socket.gethostname())
    leaders = {name: rank for rank, name in reversed(list(enumerate(names)))}
    counts = Counter(names)  # in the order of the ranks
    in_order = [name for name, num in counts.items() for _ in range(num)]
    leading = [leaders[name] for name in counts]
    return Hosts(list(counts), leading, list(counts.values()), names == in_order)


def _has_groups_of_nodes(recipe: Recipe) -> bool:
    """Whether the ranks of a node form a group, for batch norm or for weights."""
    return recipe.model.batch_norm == "node" or recipe.engine.kind == "hsdp"


def check_nodes(hosts: Hosts, must_be_in_order: bool) -> Row:
    """As many ranks on every host and, where that matters, numbered host by host."""
    summary = f"{sum(hosts.num_ranks)} ranks on {len(hosts.names)}: "
    counts = [f"{n} ({k})" for n, k in zip(hosts.names, hosts.num_ranks, strict=True)]
    most = most_common(hosts.num_ranks)
    faults = [
        f"{name} has {num} ranks, the others {most}: give every host the same slots"
        for name, num in zip(hosts.names, hosts.num_ranks, strict=True)
        if num != most
    ]
    if must_be_in_order and not hosts.are_in_order:
        faults.append("the ranks of a host do not follow one another: srun --distribution=block")
    return Row("hosts", summary + first_few(counts), faults)


def check_recipes(recipe: Recipe) -> Row:
    """Every rank's settings: torchrun is typed on each host by itself. A collective."""
    sections = recipe.model_dump(mode="json")
    own = {
        f"{section}.{key}": shown(str(value))
        for section, values in sections.items()
        for key, value in values.items()
        if (section, key) not in HOST_KEYS
    }
    same = Row("settings", "the same on all ranks")
    sha256 = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    if len(set(distributed.gather_objects(sha256))) == 1:  # a rank's settings are some 5 kB
        return same
    found = distributed.gather_objects((distributed.rank_and_host(), own))
    faults = versions.differences([name for name, _ in found], [each for _, each in found])
    return same._replace(faults=faults)


def check_hosts(
    recipe: Recipe, hosts: Hosts, thorough: bool, readers: dist.ProcessGroup | None = None
) -> list[Row]:
    """Versions and dataset; the first rank of each host looks. A collective.

    Args:
        recipe: as trained.
        hosts: of all ranks.
        thorough: whether they read all of it.
        readers: the group in which the others wait.
    """
    path, seen = recipe.data.path, None
    if thorough and distributed.is_main() and not is_url(path):
        print(f"reading all of {path} on every host", flush=True)
    if distributed.rank() in hosts.leaders:
        seen = versions.installed_versions(), dataset.inspect(path, thorough)
    looks = by_host(distributed.gather_objects(seen, readers), hosts.leaders)
    return [
        versions.compare(hosts.names, [found for found, _ in looks]),
        dataset.compare(hosts.names, [view for _, view in looks], path, thorough),
    ]


def check_clocks(hosts: Hosts) -> Row:
    """The hosts' clocks against most of them; a collective."""
    distributed.barrier()
    times = by_host(distributed.gather_objects(time.time()), hosts.leaders)
    now = most_agreed(times, MAX_CLOCK_OFFSET_S)
    faults = [
        f"{host}'s clock is {abs(t - now):.0f} s {'ahead' if t > now else 'behind'}: run an NTP "
        "service"
        for host, t in zip(hosts.names, times, strict=True)
        if abs(t - now) > MAX_CLOCK_OFFSET_S
    ]
    return Row("clocks", f"within {max(times) - min(times):.3f} s", faults)


def check_run_folder(recipe: Recipe) -> Row:
    """Every rank writes in the run's folder and sees the others' files; a collective."""
    folder = Path(recipe.run.dir)
    was_there = distributed.broadcast_object(folder.exists())
    summary, faults = f"{folder}: every rank writes and sees the others", []
    try:
        num_bytes = checkpoint_bytes(recipe)
        warning = probe_space(folder, num_bytes, recipe.run.keep_checkpoints, None)
        summary = warning or summary
    except UserError as error:
        faults = [str(error)]
    if distributed.is_main() and not was_there and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return Row("run folder", summary, faults)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint, all ranks' files together."""
    plan = plan_memory(recipe, 1)
    heads = plan.num_online_parameters * 4 / MIB
    parts = heads + plan.momentum_net_mib + plan.optimizer_mib + plan.groups_and_bank_mib
    return int(parts * MIB)


def check_memory(recipe: Recipe, device: torch.device) -> Row:
    """The memory plan of a rank against what its device has; a collective."""
    ranks, per_node = distributed.world_size(), distributed.ranks_per_node()
    try:
        images_per_rank(recipe.data.global_batch, ranks)
        planned = plan_memory(recipe, ranks, per_node).total_mib
    except UserError as error:
        return Row("memory", "", [str(error)])
    have = min(distributed.gather_objects(_memory_mib(device, per_node)))
    said = f"a rank plans {planned:.0f} MiB of {have:.0f}"
    if planned <= MAX_MEMORY_SHARE * have:
        return Row("memory", said)
    advice = "more ranks, engine.accumulate, engine.activation_checkpointing or engine.kind=hsdp"
    return Row("memory", "", [f"{said}: take {advice}"])


def check_workers(data: DataConfig) -> Row:
    """What decodes images, and on how many cores; a collective."""
    mine = workers_of_rank(data.workers, distributed.num_sharing_ranks())
    ranks = distributed.gather_objects((mine, num_usable_cores()))
    workers, cores = (sorted(set(column)) for column in zip(*ranks, strict=True))
    return Row("workers", describe_workers(data, workers, len(ranks), cores))


def _memory_mib(device: torch.device, per_node: int) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB / per_node
