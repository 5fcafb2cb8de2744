"""Builds the pretended CUDA runtime, and says how a process is started on it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from scale_smog.errors import UserError
from scale_smog.profiling.hardware import Hardware

SOURCES = Path(__file__).parent / "runtime"
CUDA_MAJOR = "13"  # torch's wheels of it link the runtime as a shared library of its own
LIBRARY = "libcuda.so.1"  # the name under which torch's libraries find it already there


def missing_requirement() -> str | None:
    """What a rehearsal lacks on this machine, with the remedy; None: nothing."""
    if not (torch.version.cuda or "").startswith(f"{CUDA_MAJOR}."):
        return (
            f"a rehearsal needs a torch built for CUDA {CUDA_MAJOR}; this one is "
            f"{torch.__version__}: pip install torch from PyPI on Linux brings one"
        )
    if shutil.which("gcc") is None:
        return "a rehearsal compiles a CUDA runtime of 300 lines: apt-get install gcc"
    if not (_headers() / "cuda_runtime_api.h").is_file():
        return f"no CUDA headers in {_headers()}: pip install nvidia-cuda-runtime"
    return None


def build_runtime() -> Path:
    """The compiled runtime, from the user's cache where it has been built before.

    Raises:
        UserError: gcc, the headers or a torch for CUDA 13 is missing, or gcc fails.
    """
    if problem := missing_requirement():
        raise UserError(problem)
    library = _cache_folder() / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / LIBRARY
            _compile(built)
            built.replace(library)
    return library


def environment(machine: Hardware) -> dict[str, str]:
    """Variables of a process that is to see a node of this machine's GPUs."""
    return {
        **os.environ,
        "LD_PRELOAD": str(build_runtime()),
        "PRETENDED_GPUS": str(machine.gpus_per_node),
        "PRETENDED_GPU_NAME": machine.name,
        "PRETENDED_GPU_MIB": str(int(machine.memory_gib * 1024)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda",
    }


def _compile(target: Path) -> None:
    sources = sorted(SOURCES.glob("*.c"))
    command = [
        *("gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"),
        *(f"-I{SOURCES}", f"-I{_headers()}", "-o", str(target)),
        *map(str, sources),
        "-lpthread",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1]
        raise UserError(f"gcc cannot build the pretended CUDA runtime: {reason}")


def _headers() -> Path:
    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{CUDA_MAJOR}" / "include"


def _cache_folder() -> Path:
    """One for each version of the sources and of CUDA."""
    content = b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.[ch]")))
    name = hashlib.sha256(content + str(torch.version.cuda).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "scale_smog" / f"pretended_cuda_{name}"
