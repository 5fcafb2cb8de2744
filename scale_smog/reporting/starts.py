"""Where and when a run began and went on: a line of starts.jsonl each time."""

import json
import platform
import socket
import time
from contextlib import suppress
from pathlib import Path

import torch

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.reporting.run_record import STARTS_FILE

CPU_FILE = Path("/proc/cpuinfo")


def note_start(recipe: Recipe, step: int, device: torch.device) -> None:
    """Adds a line on this start; a collective.

    Args:
        recipe: of the run.
        step: finished steps.
        device: of this rank.
    """
    hosts = distributed.gather_objects(socket.gethostname())
    if distributed.is_main():
        line = {
            "time": round(time.time()),
            "step": step,
            "ranks": distributed.world_size(),
            "hosts": list(dict.fromkeys(hosts)),
            "device": device_name(device),
            "torch": torch.__version__,
            "engine": recipe.engine.kind,
            "precision": recipe.engine.precision,
        }
        # As with metrics, a full disk is no reason to end a run.
        path = Path(recipe.run.dir) / STARTS_FILE
        with suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def device_name(device: torch.device) -> str:
    """What the maker calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPU_FILE.exists():
        for line in CPU_FILE.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
