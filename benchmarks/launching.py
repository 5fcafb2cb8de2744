"""What reading a batch's files costs the thread that launches kernels: both need the interpreter.

    python benchmarks/launching.py [--quick] [--threads N] [--repeats N]

1,500 small operations of torch, as many as a step of ResNet-50 launches, alone and beside a thread
that reads the 64 files of a batch once: as the loaders do, and by 16 threads, as they used to.
Needs no GPU, two cores, and a quiet machine.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from compare import claim, interleaved, parse_arguments

from scale_smog.data import EpochPlan, TarDataset
from scale_smog.data.loaders.batch_source import NUM_READERS, BatchSource
from scale_smog.data.prepare.shard import shard_folder

BATCH, NUM_OPERATIONS, NUM_BATCHES = 64, 1500, 10


def main() -> None:
    """Prints the times of both and the claim."""
    from gpu_suite import make_photos

    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_READERS) as threads:
        num = 2 * BATCH if arguments.quick else 8 * BATCH
        make_photos(Path(folder) / "photos", num)
        shard_folder(Path(folder) / "photos", Path(folder) / "tars")
        dataset = TarDataset(Path(folder) / "tars", "train")
        source = BatchSource(dataset, EpochPlan(num, BATCH), [], 0, 0, 1)

        def by_threads(ids: np.ndarray) -> None:
            for part in threads.map(lambda some: [dataset.read(int(i)) for i in some],
                                    np.array_split(ids, NUM_READERS)):  # fmt: skip
                assert part

        readers: dict[str, Callable[[np.ndarray], object]] = {
            "alone": lambda ids: None,
            "beside the loaders' reading": source.encoded,
            f"beside {NUM_READERS} reading threads": by_threads,
        }
        sides = {name: turn(source, read) for name, read in readers.items()}
        alone, ours, before = interleaved(sides, arguments.repeats * 3).values()
    text = f"ms more of {NUM_OPERATIONS} launches beside the reading of {BATCH} files: ours, by "
    text += f"{NUM_READERS} threads"
    claim(text, 1e3 * (ours - alone) / NUM_BATCHES, 1e3 * (before - alone) / NUM_BATCHES)


def turn(source: BatchSource, read: Callable[[np.ndarray], object]) -> Callable[[], None]:
    """Launches as for some batches; another thread reads one at each."""
    x, y = torch.zeros(2, 20_000)

    def run() -> None:
        with ThreadPoolExecutor(1) as loader:
            for step in range(NUM_BATCHES):
                batch = loader.submit(read, source.ids(step))
                for _ in range(NUM_OPERATIONS):
                    torch.add(x, 1.0, out=y)  # lets go of the interpreter while it runs
                batch.result()

    return run


if __name__ == "__main__":
    main()
