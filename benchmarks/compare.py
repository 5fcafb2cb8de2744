"""Two programs against each other: interleaved in one run, medians, one JSON line a claim."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice


def parse_arguments(doc: str | None, **positional: str) -> argparse.Namespace:
    """The options all benchmarks share: `--quick` (a small case), `--threads`, `--repeats`.

    `positional` maps the names of a program's own arguments to their help.
    """
    parser = argparse.ArgumentParser(description=doc)
    for name, help_ in positional.items():
        parser.add_argument(name, help=help_)
    parser.add_argument("--quick", action="store_true", help="a small case, in seconds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--repeats", type=int, help="rounds; default 5, or 2 with --quick")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    return arguments


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; one call of each is thrown away, then they take turns.

    Turns, because the speed of a shared machine drifts; every other round runs backwards,
    because a contestant may leave the caches warm for the next.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for round_ in range(rounds):
        order = list(contestants.items())
        for name, call in order if round_ % 2 == 0 else reversed(order):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        spread = f"{min(seconds):.4g} to {max(seconds):.4g}"
        print(f"  {name:<44}{statistics.median(seconds):10.4g} s   ({spread})", flush=True)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def interleaved_streams(
    contestants: Mapping[str, Callable[[], Iterable[object]]],
    num_warm_up: int,
    num_items: int,
    rounds: int,
) -> dict[str, float]:
    """Median seconds an item of each stream; every turn opens a stream anew and warms it up.

    For what works ahead: neither the start of workers nor what they prepare while another has its
    turn may count.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds):
        order = list(contestants.items())
        for name, build in order if round_ % 2 == 0 else reversed(order):
            items = iter(build())
            for _ in islice(items, num_warm_up):
                pass
            start = time.perf_counter()
            num = sum(1 for _ in islice(items, num_items))
            if not num:
                raise SystemExit(f"{name} ends within its warm-up of {num_warm_up}: more images")
            times[name].append((time.perf_counter() - start) / num)
            del items
    for name, seconds in times.items():
        spread = f"{min(seconds):.4g} to {max(seconds):.4g}"
        print(f"  {name:<44}{statistics.median(seconds):10.4g} s   ({spread})", flush=True)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def claim(text: str, ours: float, peer: float, *, higher_is_better: bool = False) -> float:
    """Prints a claim as one JSON line and returns its ratio: how many times better ours is."""
    ratio = ours / peer if higher_is_better else peer / ours
    figures = {"claim": text, "ours": ours, "peer": peer, "ratio": round(ratio, 3)}
    print(json.dumps(figures), flush=True)
    return ratio
