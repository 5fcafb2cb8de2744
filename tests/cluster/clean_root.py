"""Runs the Dockerfile's steps in a clean Debian root, and `make test` in it: `clean_root.py ROOT`.

For machines without a container engine. Needs root and debootstrap, 10 GB in ROOT and the network;
half an hour on two cores. The same command goes on where it was interrupted. Exit status 0 only if
all steps do.
"""

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"  # Python 3.11
MOUNTS = ("proc", "sys", "dev", "dev/shm")
NOT_COPIED = (".git", ".venv", "runs", "demo_data", "__pycache__", "*.egg-info")


def steps(dockerfile: str) -> Iterator[tuple[str, str]]:
    """A Dockerfile's instructions and what they say, without comments, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.M)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, " ".join(rest.split())


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """What programs expect to find in a root."""
    with ExitStack() as stack:
        for name in MOUNTS:
            subprocess.run(["mount", "--bind", f"/{name}", str(root / name)], check=True)
            stack.callback(subprocess.run, ["umount", str(root / name)])
        yield


def build(root: Path, until: int | None) -> None:
    """Runs the steps; those that are done already are left out."""
    environment, folder = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}, "/"
    for number, (word, rest) in enumerate(steps((REPOSITORY / "Dockerfile").read_text())):
        if until is not None and number >= until:
            return
        if word == "ENV":
            pairs = [pair.partition("=")[::2] for pair in shlex.split(rest)]
            environment |= {k: v.replace("$PATH", environment["PATH"]) for k, v in pairs}
        elif word == "WORKDIR":
            folder = rest
            (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = shlex.split(rest)
            place = root / folder.lstrip("/") / target
            for source in sources:
                copy(REPOSITORY / source, place)
        elif word == "RUN":
            done = root / f".step-{number}"
            print(f"step {number}: {rest}{' (done)' if done.exists() else ''}", flush=True)
            if not done.exists():
                in_root(root, folder, environment, rest)
                done.touch()
    in_root(root, folder, environment, "make test")


def copy(source: Path, place: Path) -> None:
    """A file, or a folder without what is made again."""
    if source.is_dir():
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=ignored, symlinks=True)
    else:
        shutil.copy(source, place)


def in_root(root: Path, folder: str, environment: dict[str, str], script: str) -> None:
    """Runs a line of shell in the root."""
    variables = [f"{k}={v}" for k, v in environment.items()]
    command = ["chroot", str(root), "env", "-i", *variables, "sh", "-c", f"cd {folder} && {script}"]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--until", type=int, help="stop before this step of the Dockerfile")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if not (root / "etc" / "debian_version").exists():
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(root), MIRROR], check=True)
    (root / "etc" / "resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
    with mounted(root):
        build(root, arguments.until)


if __name__ == "__main__":
    main()
