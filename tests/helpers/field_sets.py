"""Makes what people bring, and says what came of it."""

import json
import os
import runpy
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from images import jpeg

from scale_smog.data import TarDataset
from scale_smog.data.prepare.index import index_folder
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.data.prepare.verify import verify_folder
from scale_smog.errors import UserError

ROOT = Path(__file__).parents[2]


def write_images(folder: Path, names: Iterable[str]) -> Path:
    """Small sound images under these names, each of its own pixels."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20, 16, seed))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes], tar_format: int = tarfile.USTAR_FORMAT):
    """A tar of members by their names; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def samples(labels: Iterable[object] = "0101010101", name: str = "{:04d}") -> dict[str, bytes]:
    """Members of a usual webdataset tar: an image and a label a key."""
    members = {}
    for i, label in enumerate(labels):
        members[f"{name.format(i)}.jpg"] = jpeg(20, 16, i)
        members[f"{name.format(i)}.cls"] = str(label).encode()
    return members


def sharded(source: str | Path, out: Path, **options: Any) -> TarDataset:
    """Shards a source, checks the result as verify.py does, and opens it."""
    shard_folder(source, out, workers=1, **options)
    assert verify_folder(out) == []
    return TarDataset(out, options.get("split", "train"))


def indexed(folder: Path, **options: Any) -> TarDataset:
    """Indexes a folder of tars, checks the result as verify.py does, and opens it."""
    index_folder(folder, **options)
    assert verify_folder(folder) == []
    return TarDataset(folder, "train")


def labels_by_class(dataset: TarDataset) -> dict[str | None, int]:
    """How many images of each class; None: without one."""
    names = [dataset.classes[i] if i >= 0 else None for i in dataset.labels.tolist()]
    return dict(Counter(names))


def refusal(call: Callable[..., object], *args: Any, **options: Any) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        call(*args, **options)
    return " ".join(str(error.value).split())  # as the programs print it


def quarantine(out: Path, split: str = "train") -> dict[str, str]:
    """File and reason of all that was put aside."""
    lines = (out / f"{split}-quarantine.jsonl").read_text().splitlines()
    return {line["file"]: line["reason"] for line in map(json.loads, lines)}


def run_tool(tool: str, *arguments: object, **variables: str) -> tuple[int, str]:
    """Runs a program of data_tools/ as a user does; its exit code, and what it says on stderr."""
    command = [sys.executable, str(ROOT / "data_tools" / f"{tool}.py"), *map(str, arguments)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=600,  # guards against a hang, not against a busy machine
        errors="replace",
    )
    return ended.returncode, ended.stderr


def run_tool_here(tool: str, *arguments: object) -> tuple[int, str]:
    """The same in this process."""
    said = StringIO()
    words = [f"{tool}.py", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "data_tools" / words[0]), run_name="__main__")
    return int(end.value.code or 0), said.getvalue()
