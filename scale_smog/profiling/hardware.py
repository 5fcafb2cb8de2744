"""The machines that steps are predicted for: small YAML files, to be copied and edited."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import Field, ValidationError, field_validator

from scale_smog.config import Positive, Section
from scale_smog.errors import UserError

FOLDER = Path(__file__).parent / "hardware"
GIGA, MICRO = 1e9, 1e-6

Amount = Annotated[float, Field(gt=0, strict=False)]
# What is not known exactly: optimistic, nominal, pessimistic.
Range = Annotated[tuple[float, float, float], Field(strict=False)]
AmountRange = Annotated[tuple[Amount, Amount, Amount], Field(strict=False)]


RING_SHARES = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5}


class Link(Section):
    """What a collective costs: latency + bytes / bandwidth."""

    latency_us: Range  # of a small all-reduce; on a network, added for each doubling of nodes
    gb_per_s: AmountRange  # that a GPU sends while all others do


class Hardware(Section):
    """A GPU, its node and the network between nodes."""

    name: str
    gpus_per_node: Positive
    tflops: dict[str, Amount]  # peak of matrix products, by `engine.precision`
    memory_gib: Amount = 80.0  # of a GPU
    memory_gb_per_s: Amount
    roofline_fraction: Range  # of the eager roof that a step's passes reach
    op_us: Range  # of the host, a kernel or copy that it launches
    loader_images_per_s: Range  # that one GPU's loader makes
    node: Link
    network: Link
    overlap: Range  # share of communication during the backward pass that can hide behind it
    collective_shares: dict[str, Amount] = Field(default=RING_SHARES)  # of an all-reduce's time
    straggler: Range  # standard deviation of a GPU's step, as a share of the step

    @field_validator("tflops")
    @classmethod
    def _has_fp32(cls, values: dict[str, float]) -> dict[str, float]:
        if "fp32" not in values:
            raise ValueError("fp32 is missing")
        return values

    def at(self, estimate: int) -> Callable[[Range], float]:
        """Picks one value of each range: 0 optimistic, 1 nominal, 2 pessimistic."""
        return lambda values: values[estimate]

    @property
    def bytes_per_s(self) -> float:
        """Of the memory."""
        return self.memory_gb_per_s * GIGA

    def flops_per_s(self, precision: str) -> float:
        """Peak of matrix products; fp64 counts as fp32 where the file does not name it."""
        return self.tflops.get(precision, self.tflops["fp32"]) * 1e12


def load_hardware(name: str) -> Hardware:
    """Reads a hardware file, by its path or by the name of one that comes with the package.

    Raises:
        UserError: there is no such file, or a key of it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(f"no hardware file {name}: give a path, or one of {known}")
    try:
        return Hardware.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, problem["loc"])) if problem else "not plain YAML"
        what = problem["msg"].lower() if problem else str(error)
        raise UserError(f"hardware file {path}: {where}: {what}") from None


def hardware_name(device: torch.device) -> str | None:
    """The name of the file that describes a device; None if there is none.

    The files are of SXM modules: PCIe and NVL cards of the same name have less of everything, an
    A100 of 80 GB a faster memory than the file's, and a GH200 is no H200.
    """
    if device.type != "cuda":
        return None
    return _name_of(
        torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    )


def _name_of(card: str, num_bytes: int) -> str | None:
    words = set(re.split(r"[\s-]+", card.lower()))
    if words & {"pcie", "nvl"}:
        return None
    for name in sorted(p.stem for p in FOLDER.glob("*.yaml")):
        if name in words:
            memory_gib = load_hardware(name).memory_gib
            return name if abs(num_bytes / 2**30 / memory_gib - 1) < 0.15 else None
    return None
