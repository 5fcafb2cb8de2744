"""Versions of what a step runs through: the same on every host, or the hosts train apart."""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.cuda import nccl

from scale_smog.preflight.table import Row, most_common

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "timm",
    "webdataset",
    "numpy",
    "pydantic",
    "safetensors",
)
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def installed_versions() -> dict[str, str]:
    """Of this host: what -> version."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))
        found["GPU"] = torch.cuda.get_device_name()
    if DRIVER_FILE.exists():
        driver = re.search(r"\d+\.\d+(\.\d+)*", DRIVER_FILE.read_text())
        found["driver"] = driver.group() if driver else "unknown"
    return found | {"scale_smog": _code_sha256()[:12]}


def _code_sha256() -> str:
    """Hex SHA-256 over this package's source files: one name for what is running."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compare(hosts: Sequence[str], found: Sequence[dict[str, str]]) -> Row:
    """Names every host that has another version than most; where it is a draw, than rank 0's.

    Args:
        hosts: names.
        found: `installed_versions` of each.
    """
    faults = differences(hosts, found)
    summary = ", ".join(f"{name} {value}" for name, value in found[0].items() if value != "none")
    return Row("versions", summary, faults)


def differences(hosts: Sequence[str], found: Sequence[dict[str, str]]) -> list[str]:
    """A line on each that has another value than most; arguments as above."""
    faults = []
    names = dict.fromkeys(name for each in found for name in each)
    for name in names:
        values = [each.get(name, "none") for each in found]
        most = most_common(values)
        example = hosts[values.index(most)]
        faults += [
            f"{host} has {name} {value}, {example} has {most}"
            for host, value in zip(hosts, values, strict=True)
            if value != most
        ]
    return faults
