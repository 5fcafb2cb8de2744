"""Where and when a run began, went on and ended for good: a line of starts.jsonl each time."""

import json
import platform
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.reporting.run_record import read_lines
from scale_smog.runtime import run_layout

CPU_FILE = Path("/proc/cpuinfo")


def note_start(recipe: Recipe, step: int, device: torch.device) -> None:
    """Adds a line on this start; a collective.

    Args:
        recipe: of the run.
        step: finished steps.
        device: of this rank.
    """
    hosts = distributed.gather_objects(socket.gethostname())
    facts = {
        "ranks": distributed.world_size(),
        "hosts": list(dict.fromkeys(hosts)),
        "device": device_name(device),
        "torch": torch.__version__,
        "engine": recipe.engine.kind,
        "precision": recipe.engine.precision,
    }
    _add_line(Path(recipe.run.dir), step, facts)


def note_end(run_dir: Path, step: int) -> None:
    """Adds a line on the end of the run, when all that it logs is in its files."""
    _add_line(run_dir, step, {"ended": True})


def has_ended(run_dir: Path) -> bool:
    """Whether the run has come to its end, and was not started again since."""
    lines = read_lines(run_dir / run_layout.STARTS_FILE)
    return bool(lines) and "ended" in lines[-1]


def _add_line(run_dir: Path, step: int, facts: dict[str, Any]) -> None:
    if distributed.is_main():
        line = {"time": round(time.time()), "step": step, **facts}
        # As with metrics, a full disk is no reason to end a run.
        with suppress(OSError), open(run_dir / run_layout.STARTS_FILE, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that a full disk has torn
            file.write(json.dumps(line).encode() + b"\n")


def device_name(device: torch.device) -> str:
    """What the maker calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPU_FILE.exists():
        for line in CPU_FILE.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
