"""Writing shards: two workers against one, against webdataset's ShardWriter, and after kill -9.

    python benchmarks/sharding.py IMAGES [--quick] [--repeats N]

IMAGES is an image folder with a sub-folder per class, such as CIFAR-10's 50,000 training images.
Every round writes it anew. The last part kills the sharder, with all its processes, at random
instants, runs it again and compares every file with those of an undisturbed run.
"""

# webdataset exports its names lazily.
# pyright: reportAttributeAccessIssue=false

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset
from compare import claim, interleaved, parse_arguments

from scale_smog.data.prepare.sources.folder import folder_source

PROGRAM = Path(__file__).parents[1] / "data_tools" / "shard.py"
NUM_QUICK = 3000


def _sharder(images: Path, out: Path, *options: str) -> Callable[[], None]:
    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(_command(images, out, *options), check=True, stderr=subprocess.DEVNULL)

    return run


def _command(images: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(PROGRAM), str(images), str(out), *options]


def _shard_writer(images: Path, out: Path) -> Callable[[], None]:
    """The loop that webdataset's documentation has, over a shuffled list, in this process."""

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        listed = list(folder_source(images).images)
        random.Random(0).shuffle(listed)
        with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxcount=2000, verbose=0) as writer:
            for key, image in enumerate(listed):
                content = (images / image.name).read_bytes()
                writer.write({"__key__": f"{key:012d}", "jpg": content, "cls": image.label})

    return run


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_resume(images: Path, out: Path, options: list[str], instants: list[float]) -> int:
    """How many of the runs, killed after so many seconds and run again, equal an undisturbed run.

    The whole process group is killed, as a power cut would: no worker lives on to clean up.
    """
    command = _command(images, out, *options)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    expected = _files(out)
    num_equal = 0
    for instant in instants:
        shutil.rmtree(out)
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(instant)
        was_running = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if was_running else None
        process.wait()
        num_done = len(list((out / ".sharding-train").glob("train-*.json")))
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        same = _files(out) == expected
        num_equal += same
        state = f"killed with {num_done} shards finished" if was_running else "finished before"
        print(f"  {instant:6.2f} s: {state}; {'identical' if same else 'DIFFERENT'}", flush=True)
    return num_equal


def main() -> None:
    arguments = parse_arguments(__doc__, images="image folder with a sub-folder per class")
    images = Path(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if arguments.quick:
            images = _first_images(images, place / "images")
        seconds = interleaved(
            {
                "all checks, 1 worker": _sharder(images, place / "one", "--workers=1"),
                "all checks, 2 workers": _sharder(images, place / "two", "--workers=2"),
                "no checks, 2 workers": _sharder(
                    images, place / "off", "--workers=2", "--no-check"
                ),
                "webdataset.ShardWriter": _shard_writer(images, place / "theirs"),
            },
            arguments.repeats,
        )
        one, two, off, theirs = seconds.values()
        shards = ["--workers=2", f"--shard-samples={200 if arguments.quick else 1000}"]
        num_kills = 3 if arguments.quick else 20
        span = (off + two) / 2
        instants = [span * random.Random(i).uniform(0.1, 0.95) for i in range(num_kills)]
        equal = kill_and_resume(images, place / "killed", shards, instants)
        claim("runs identical after kill -9", equal, num_kills, higher_is_better=True)
        claim("s, sharding with all checks, two workers against one", two, one)
        claim("s, two workers without checks against webdataset.ShardWriter, one", off, theirs)


def _first_images(images: Path, folder: Path) -> Path:
    for image in folder_source(images).images[:: max(1, 50_000 // NUM_QUICK)]:
        target = folder / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / image.name, target)
    return folder


if __name__ == "__main__":
    main()
