"""Runs the benchmarks that need no tars; writes results/all_<machine>_<date>.md, or of a part.

    python benchmarks/run_all.py [--quick] [--images FOLDER] [--small-images FOLDER] [--only NAME …]

FOLDER is an image folder with a sub-folder a class: large images such as 400 of ImageNet for the
loader and the pipeline, small ones such as CIFAR-10's for sharding and the comparison with lightly.
Without them, images are drawn. A benchmark that fails, or lacks its peer, is reported so.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
LARGE, SMALL = "large images", "small images"
NEEDS: dict[str, str] = {
    "step": "",
    "method_cost": "",
    "framework": SMALL,
    "pipeline": LARGE,
    "loader": LARGE,
    "sharding": SMALL,
    "store": "",
    "launching": "",
    "optimizer": "",
    "engine_overhead": "",
    "engine_memory": "",
    "group_update": "",
    "kmeans": "",
    "evaluation": "",
    "scaling": "",
    "profiling": "",
    "backbones": "",
    "checkpoint": "",
}
LIMIT_S = 1800


def main() -> None:
    """Prints every program's claims as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases")
    parser.add_argument("--images", default="", help="folder of large images")
    parser.add_argument("--small-images", default="", help="folder of small images")
    parser.add_argument("--only", nargs="*", default=list(NEEDS), choices=list(NEEDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = {
            LARGE: arguments.images or _draw(Path(folder) / "large", (500, 375)),
            SMALL: arguments.small_images or _draw(Path(folder) / "small", (32, 32)),
        }
        rows = []
        for name in arguments.only:
            program = [sys.executable, str(FOLDER / f"{name}.py")]
            program += [images[NEEDS[name]]] if NEEDS[name] else []
            program += ["--quick"] if arguments.quick else []
            rows += run(name, program)
    words = (["--quick"] if arguments.quick else []) + (
        [] if arguments.only == list(NEEDS) else ["--only", *arguments.only]
    )
    kind = "_".join(word.strip("-") for word in words) or "all"  # a part leaves the whole's page
    machine = f"{os.cpu_count()}cpu" + ("_gpu" if torch.cuda.is_available() else "")
    path = FOLDER / "results" / f"{kind}_{machine}_{date.today()}.md"
    path.write_text(_page(rows, words))
    print(f"written to {path}")
    measured = sum("ratio" in row for row in rows)
    closing = {"claim": "rows measured", "ours": measured, "peer": len(rows)}
    print(json.dumps(closing | {"ratio": round(measured / max(1, len(rows)), 3)}))


def run(name: str, program: list[str]) -> list[dict[str, Any]]:
    """The claims of a program, or why there are none."""
    print(f"\n{name}", flush=True)
    begin = time.perf_counter()
    try:
        ended = subprocess.run(program, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return [{"program": name, "claim": f"not measured: longer than {LIMIT_S} s"}]
    seconds = time.perf_counter() - begin
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"claim"')]
    for line in lines:
        print(line, flush=True)
    if ended.returncode or not lines:
        reason = (ended.stderr.strip().splitlines() or ["it made no claim"])[-1]
        print(f"not measured: {reason}", flush=True)
        return [{"program": name, "claim": f"not measured: {reason}"}]
    return [json.loads(line) | {"program": name, "seconds": seconds} for line in lines]


def _draw(folder: Path, size: tuple[int, int]) -> str:
    from gpu_suite import make_photos

    make_photos(folder, 400, size)
    return str(folder)


def _page(rows: list[dict[str, Any]], words: list[str]) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        f"# Benchmarks, {os.cpu_count()} cores, {platform.machine()}, {gpu}, {date.today()}",
        "",
        f"`{' '.join(['python benchmarks/run_all.py', *words])}`, torch {torch.__version__}."
        + (" Small cases: they show that all runs, not how fast." if "--quick" in words else ""),
        "",
        "| program | claim | ours | peer | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [f"{row[k]:.4g}" if k in row else "" for k in ("ours", "peer", "ratio")]
        lines.append(f"| {row['program']} | {row['claim']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
