"""Object stores as folders, reached through fsspec: s3:, gs:, az:, hf:, https: and all it knows.

A request that fails is made again, with growing delays, and a line on stderr names the store, its
answer and the wait. Credentials come from where a store's own library looks for them (environment,
files, the machine's role) and are looked up anew when the store refuses them; no message shows any.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from scale_smog.errors import UserError
from scale_smog.runtime.files import write_atomically

T = TypeVar("T")

PATIENCE_S = 300.0  # that one request may take with all its tries
REFUSAL_PATIENCE_S = 60.0  # the same where credentials are refused: new ones may be on their way
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0
SAY_EVERY_S = 10.0
LOOK_EVERY_S = 1.0  # for other credentials
NUM_CONNECTIONS = 64  # of a process
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
EXTRAS |= {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place in a store, such as s3://bucket/imagenet."""
    return re.match(r"[a-z][a-z0-9+]*://", str(path)) is not None


def shown(url: str) -> str:
    """A URL, or a text with some, without the parts that may hold secrets.

    Of a command (`pipe:curl -H ... URL`) nothing is left.
    """
    url = re.sub(r"pipe:[\s\S]*", "pipe:...", url)
    return re.sub(r"\?[^\s'\"#]+", "?...", re.sub(r"://[^/\s]+@", "://", url))


class Store:
    """A folder of an object store; may be used by threads, pickled, and carried over a fork.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None  # process, file system, root in it
        self._opened_at = 0.0
        self._is_own = False  # else stores of a process share a file system: it takes .2 s to make
        self._lock = threading.Lock()
        self._num_repeated, self._said_at = 0, -SAY_EVERY_S

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine, if it is."""
        path = self.url.removeprefix("file://")
        return None if is_url(path) else Path(path)

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file's content, or its bytes from `start` to `stop`.

        Raises:
            FileNotFoundError: there is none.
            OSError: the store does not give it, or another number of bytes.
        """

        def read(system: Any, path: str) -> bytes:
            content = system.cat_file(path, start=start, end=stop)
            if start is not None and stop is not None and len(content) != stop - start:
                raise OSError(f"sent {len(content)} bytes of {stop - start}")
            return content

        return self._persist(name, read)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all.

        Raises:
            OSError: the store does not take it.
        """
        self._persist(name, lambda system, path: system.pipe_file(path, content))

    def upload(self, file: Path, name: str) -> None:
        """Writes a file from a local one, in parts where it is large; whole or not at all.

        Raises:
            OSError: the store does not take it.
        """
        self._persist(name, lambda system, path: system.put_file(str(file), path))

    def download(self, name: str, file: Path) -> None:
        """Copies a file to a local one.

        Raises:
            FileNotFoundError: there is none.
            OSError: the store does not give it.
        """
        self._persist(name, lambda system, path: system.get_file(path, str(file)))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there.

        Raises:
            OSError: the store does not do it.
        """
        try:
            self._persist(name, lambda system, path: system.rm_file(path))
        except FileNotFoundError:
            pass

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none.

        Raises:
            OSError: the store does not say.
        """
        try:
            return self._persist(name, lambda system, path: system.size(path))
        except FileNotFoundError:
            return None

    def sizes(self, pattern: str = "*") -> dict[str, int]:
        """Bytes of the files whose name fits `pattern`; those in sub-folders as folder/name.

        Raises:
            OSError: the store does not list them.
        """

        def find(system: Any, path: str) -> dict[str, int]:
            found = system.find(path, detail=True)
            root = path.lstrip("/")
            names = {key.lstrip("/").removeprefix(f"{root}/"): x for key, x in found.items()}
            return {name: x["size"] for name, x in names.items() if fnmatch(name, pattern)}

        return self._persist("", find)

    def _persist(self, name: str, request: Callable[[Any, str], T]) -> T:
        """What a request returns, made until it succeeds, is no use, or patience ends."""
        began, delay_s = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                system, root = self._file_system()
                return request(system, f"{root}/{name}" if name else root)
            except (FileNotFoundError, IsADirectoryError, UserError, NotImplementedError):
                raise
            except Exception as error:  # every library has its own
                refused = _is_refusal(error)
                waited_s = time.monotonic() - began
                patience_s = min(PATIENCE_S, REFUSAL_PATIENCE_S) if refused else PATIENCE_S
                if waited_s > patience_s or isinstance(error, (TypeError, AttributeError)):
                    raise OSError(None, f"{_words(error)} (tried for {waited_s:.0f} s)") from None
                if refused:
                    self._look_again()
                self._say(name, error, waited_s)
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)

    def _say(self, name: str, error: Exception, waited_s: float) -> None:
        with self._lock:
            self._num_repeated += 1
            now = time.monotonic()
            if now - self._said_at < SAY_EVERY_S:
                return
            self._said_at = now
        print(
            f"{self}/{name}: {_words(error)}; trying again after {waited_s:.0f} s "
            f"({self._num_repeated} requests tried again so far)",
            file=sys.stderr,
            flush=True,
        )

    def _look_again(self) -> None:
        """The next request looks for credentials again, if that was not done just now."""
        with self._lock:
            if time.monotonic() - self._opened_at > LOOK_EVERY_S:
                self._opened, self._is_own = None, True

    def _file_system(self) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), *_open(self.url, self._is_own))
                self._opened_at = time.monotonic()
            return self._opened[1:]


class Folder:
    """A folder of this machine, with some of what `Store` has."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.url = Path(path), str(path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """A file's content."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        write_atomically(self.path / name, content)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        path = self.path / name
        return path.stat().st_size if path.exists() else None


def open_folder(path: str | os.PathLike[str]) -> Store | Folder:
    """The folder that a path or a URL names."""
    return Store(str(path)) if is_url(path) else Folder(path)


def _open(url: str, is_own: bool) -> tuple[Any, str]:
    """The file system of a URL, the process's or one of its own, and the path in it.

    Raises:
        UserError: fsspec does not know the protocol, or its library is not installed.
    """
    from fsspec.core import url_to_fs  # takes a while, and a run from a disk never needs it

    protocol = url.partition("://")[0] if is_url(url) else "file"
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):  # tries of its own would be silent
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": NUM_CONNECTIONS}
        options["config_kwargs"] = config
    try:
        system, root = url_to_fs(url, skip_instance_cache=is_own, **options)
    except ImportError as error:
        library = EXTRAS.get(protocol, protocol)
        raise UserError(f"{shown(url)} needs {library} ({error}): pip install {library}") from None
    except ValueError as error:
        raise UserError(f"{shown(url)}: {error}") from None
    if protocol == "file":
        from scale_smog.runtime.disk import Disk

        return Disk(root.rstrip("/")), root.rstrip("/")
    if protocol in ("s3", "s3a"):
        system.retries = 1
    return system, root.rstrip("/")


def _is_refusal(error: Exception) -> bool:
    """Whether credentials are missing, wrong or too old."""
    return isinstance(error, PermissionError) or "Credentials" in type(error).__name__


def _words(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)
