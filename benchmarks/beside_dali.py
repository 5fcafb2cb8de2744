"""What a step loses to DALI beside it: cores, the driver, or the hand-over of the views.

    python benchmarks/beside_dali.py [--quick] [--threads N] [--repeats N]

ResNet-50 x1 with 64 images of 224 px on a GPU has lost up to half of its speed to DALI. The same
step in turns: with views that are there; beside busy processor cores; beside threads of this
process that read the files as DALI asks for them; beside DALI whose views nobody reads; fed by DALI
in this process; the same with the step on a stream of its own, as the default stream of CUDA waits
for others; and fed by DALI in a process of its own, which has its own locks in the interpreter and
in the driver and copies the views to memory of the GPU that both know. Beside the seconds of a step
are those that its loop waited for the views. Without a GPU it only shows that it runs.
"""

import dataclasses
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import count, repeat
from pathlib import Path
from threading import Event

import torch
import torch.multiprocessing as mp
from compare import claim, interleaved_streams, parse_arguments
from step import Ours, one_rank, step_recipe
from torch import Tensor

from scale_smog.config import Recipe
from scale_smog.data.augment import training_views
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import open_split
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.build import build_plan
from scale_smog.loop import train_step
from scale_smog.profiling.timing import synchronize
from scale_smog.throughput import FIXED_VALUES, build_batches

NUM_STEPS, NUM_SLOTS = 1000, 4  # at most, of a turn; batches that the other process is ahead
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ALONE, IN_PROCESS = "views that are there", "fed by DALI in this process"
OWN_STREAM = "the same, the step on a stream of its own"
OWN_PROCESS = "fed by DALI in a process of its own"

Waits = dict[str, list[float]]  # seconds that each arrangement's loop waited for a batch
Streams = Mapping[str, Callable[[], Iterable[None]]]


def main() -> None:
    """Prints the seconds of a step and what a process of its own is worth."""
    from gpu_suite import make_photos

    from scale_smog.data.prepare.shard import shard_folder

    arguments = parse_arguments(__doc__)
    batch, px, num = (4, 32, 64) if arguments.quick else (64, 224, 1024)
    with one_rank(), tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder) / "photos", num)
        tars = Path(folder) / "tars"
        shard_folder(Path(folder) / "photos", tars)
        ours = Ours(step_recipe(batch, px, 1), DEVICE)
        streams, waits = arrangements(ours, tars, arguments.threads)
        num_timed = 3 if arguments.quick else 20
        seconds = interleaved_streams(streams, num_timed, num_timed, arguments.repeats)
    for name, times in waits.items():
        print(f"    waited for views, {name:<44}{1e3 * statistics.median(times):8.2f} ms")
    text = f"ms a step with DALI, {arguments.threads} threads: in a process of its own, in this one"
    claim(text, 1e3 * seconds[OWN_PROCESS], 1e3 * seconds[IN_PROCESS])


def arrangements(ours: Ours, tars: Path, threads: int) -> tuple[Streams, Waits]:
    """Streams of an item a step, and what their loops waited for, which fills as they run.

    Args:
        ours: the step.
        tars: what DALI reads.
        threads: of DALI's processor part, and how many cores are kept busy.
    """
    data = {"path": str(tars), "loader": "dali", "workers": threads}
    recipe = ours.recipe.model_copy(update={"data": ours.recipe.data.model_copy(update=data)})
    batches: dict[str, Callable[[], Iterable[Batch]]] = {
        ALONE: lambda: repeat(ours.batch),
        "beside busy cores": lambda: beside_busy_cores(ours.batch, threads),
        "beside the reading of files": lambda: beside_reading(ours.batch, recipe),
        "beside DALI whose views nobody reads": lambda: beside_loading(ours.batch, recipe),
        IN_PROCESS: lambda: loaded(recipe),
        OWN_STREAM: lambda: loaded(recipe),
        OWN_PROCESS: lambda: from_another_process(ours.batch, recipe),
    }
    waits: Waits = defaultdict(list)
    streams = {
        name: partial(trained, ours, build, waits[name], name == OWN_STREAM)
        for name, build in batches.items()
    }
    return streams, waits


def trained(
    ours: Ours, build: Callable[[], Iterable[Batch]], waits: list[float], has_stream: bool
) -> Iterator[None]:
    """An item a step, when the GPU has done it."""
    with on_own_stream() if has_stream else nullcontext():
        batches = iter(build())
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - begin)
            train_step(ours.state, batch, FIXED_VALUES)
            if DEVICE.type == "cuda":  # not all of it: the loader's own streams go on
                torch.cuda.current_stream(DEVICE).synchronize()
            yield


@cache
def own_stream() -> torch.cuda.Stream:
    """One for all turns: torch keeps the memory that a stream has used."""
    return torch.cuda.Stream(DEVICE)


def on_own_stream() -> AbstractContextManager[object]:
    """Inside, work of torch goes to a stream that waits for no other."""
    if DEVICE.type != "cuda":
        return nullcontext()
    stream = own_stream()
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    return torch.cuda.stream(stream)


def loaded(recipe: Recipe) -> Iterable[Batch]:
    """The recipe's loader."""
    return build_batches(recipe, recipe.data.global_batch, NUM_STEPS, False, DEVICE)


def beside_busy_cores(batch: Batch, num_cores: int) -> Iterator[Batch]:
    """The same batch again and again, while processes keep cores busy."""
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(num_cores)]
    try:
        yield from repeat(batch)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def beside_reading(batch: Batch, recipe: Recipe) -> Iterator[Batch]:
    """The same batch again and again, while a thread reads and draws what DALI asks for."""
    from scale_smog.data.loaders.dali import ExternalSource

    dataset = open_split(recipe.data.path, "train")
    plan = build_plan(recipe.data, dataset, seed=0)
    views = training_views(recipe.data, recipe.augment)
    read = ExternalSource(BatchSource(dataset, plan, views, 0, 0, 1), start=0)
    with ThreadPoolExecutor(1) as thread:
        for step in count():
            batch_of_files = thread.submit(read, step)
            yield batch
            batch_of_files.result()


def beside_loading(batch: Batch, recipe: Recipe) -> Iterator[Batch]:
    """The same batch again and again, while a thread loads others as fast as it can."""
    is_over = Event()

    def load() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        for _ in loaded(recipe):
            if is_over.is_set():
                break

    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        try:
            yield from repeat(batch)
        finally:
            is_over.set()
            loading.result()


def from_another_process(like: Batch, recipe: Recipe) -> Iterator[Batch]:
    """Batches that another process has loaded into memory that both know.

    A batch is overwritten only when the next one is asked for: its step has been waited for.
    """
    context = mp.get_context("spawn")
    slots = [[torch.empty_like(view) for view in like.large] for _ in range(NUM_SLOTS)]
    full, free = context.Queue(), context.Queue()
    for slot in range(NUM_SLOTS):
        free.put(slot)
    process = context.Process(target=fill, args=(recipe, slots, free, full), daemon=True)
    process.start()
    try:
        while True:
            slot = full.get(timeout=120)
            yield dataclasses.replace(like, large=slots[slot])
            free.put(slot)
    finally:
        free.put(None)
        process.join(30)
        process.kill()
        process.join()


def fill(recipe: Recipe, slots: list[list[Tensor]], free: "mp.Queue", full: "mp.Queue") -> None:
    """The other process: loads into slots as they become free, until it is told to end."""
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    with one_rank():
        for batch in loaded(recipe):
            if (slot := free.get()) is None:
                return
            for place, view in zip(slots[slot], batch.large, strict=True):
                place.copy_(view)
            synchronize(DEVICE)
            full.put(slot)


if __name__ == "__main__":
    main()
