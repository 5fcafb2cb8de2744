"""Shared libraries that a pipeline opens first when an operator needs them: opened now, by name."""

import ctypes
import importlib.metadata
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

from scale_smog import distributed
from scale_smog.config import DataConfig
from scale_smog.preflight.table import Row

# What DALI's GPU operators open, and the wheel that brings it, for either of its packages.
DALI_LIBRARIES: dict[str, dict[str, str]] = {
    "nvidia-dali-cuda120": {
        "libnppc.so.12": "nvidia-npp-cu12",
        "libnppicc.so.12": "nvidia-npp-cu12",
        "libnppig.so.12": "nvidia-npp-cu12",
        "libcufft.so.11": "nvidia-cufft-cu12",
        "libnvjpeg.so.12": "nvidia-nvjpeg-cu12",
        "libnvimgcodec.so.0": "nvidia-nvimgcodec-cu12",
    },
    "nvidia-dali-cuda130": {
        "libnppc.so.13": "nvidia-npp",
        "libnppicc.so.13": "nvidia-npp",
        "libnppig.so.13": "nvidia-npp",
        "libcufft.so.12": "nvidia-cufft",
        "libnvjpeg.so.13": "nvidia-nvjpeg",
        "libnvimgcodec.so.0": "nvidia-nvimgcodec-cu13",
    },
}


def check_libraries(data: DataConfig, device: torch.device) -> Row:
    """What the loader's pipeline opens, on every rank; a collective."""
    needed = needed_libraries(data, device)
    own = [f"{distributed.rank_and_host()}: {line}" for line in missing_libraries(needed)]
    faults = [line for lines in distributed.gather_objects(own) for line in lines]
    return Row("libraries", ", ".join(needed) or f"data.loader={data.loader} needs none", faults)


def needed_libraries(data: DataConfig, device: torch.device) -> dict[str, str]:
    """Library -> wheel; none but for DALI on a GPU."""
    is_on_gpu = device.type == "cuda" and data.device != "cpu"
    package = installed_dali()
    if data.loader not in ("dali", "fast") or not is_on_gpu or package is None:
        return {}
    return DALI_LIBRARIES[package]


def installed_dali() -> str | None:
    """The installed one of DALI's packages: they differ in the CUDA version that they run on."""
    names = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    return next((name for name in DALI_LIBRARIES if name in names), None)


def missing_libraries(needed: Mapping[str, str]) -> list[str]:
    """A line on each that does not open, with the remedy."""
    return [
        f"{name} does not open ({problem}): pip install {wheel}"
        for name, wheel in needed.items()
        if (problem := _open(name))
    ]


def _open(name: str) -> str | None:
    """Why it does not open where the loader or NVIDIA's wheels have it; None: it does."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [name, *map(str, sorted(packages.glob(f"**/{name}")))]
    problem = None
    for place in reversed(places):
        try:
            ctypes.CDLL(place)
            return None
        except OSError as error:
            problem = str(error)
    return problem
