"""Peaks of a device without a data sheet, such as this machine's CPU, measured in half a second."""

import torch

from scale_smog.profiling.timing import time_calls

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
REPEATS = 5
SIDE = 1024  # of the square matrices
COPIED = 2**26  # bytes: more than caches hold


def measure_peaks(device: torch.device, precision: str) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second of a copy, each at its best."""
    a = torch.randn(SIDE, SIDE, device=device).to(DTYPES[precision])
    out = torch.empty_like(a)
    product_s = min(time_calls(lambda: torch.mm(a, a, out=out), device, REPEATS))
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.zeros_like(source)
    copy_s = min(time_calls(lambda: target.copy_(source), device, REPEATS))
    return 2 * SIDE**3 / product_s, 2 * COPIED / copy_s
