"""Every rank's log file in the run's folder; the console is rank 0's and the first failure's.

The first rank that fails shows its error on the console, in full; the others, which fail because it
is gone, keep theirs to their files: what is read last on the console is the cause.
"""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.runtime import flight_recorder, phases

FOLDER = "logs"
FAILURE_FILE = "first-failure.txt"
_console: TextIO | None = None


def console() -> TextIO:
    """Where a rank may say what everybody must read; rank 0's also goes into its file."""
    return _console or sys.stderr


class RankLogs:
    """The logs of a run's rank, from `open` to the end (`with`); a lone rank has only its console.

    An error that leaves the block is reported here, and becomes exit status 1.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # None where a service has closed it
        sys.stderr = sys.stderr or open(os.devnull, "w")
        return self

    def open(self, run_dir: Path) -> None:
        """From here on this rank writes into its file; a collective."""
        global _console
        if distributed.world_size() == 1:
            return
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)  # NFS may still believe that there is none
        if distributed.is_main():
            (folder / FAILURE_FILE).unlink(missing_ok=True)
        distributed.barrier()
        name = f"rank-{distributed.rank():05d}.log"
        self._file = open(folder / name, "a", buffering=1, encoding="utf-8")
        self._say(f"{distributed.rank_and_host()}, process {os.getpid()}")
        self._streams = sys.stdout, sys.stderr
        self._descriptors: list[int] = []
        self._folder = folder
        if distributed.is_main():
            sys.stdout, sys.stderr = (Tee(stream, self._file) for stream in self._streams)
            return
        sys.stdout, sys.stderr = (Tee(stream) for stream in self._streams)  # both are the file
        _console = os.fdopen(os.dup(2), "w")
        for number in (1, 2):  # what libraries print themselves, too
            self._streams[number - 1].flush()
            self._descriptors.append(os.dup(number))
            os.dup2(self._file.fileno(), number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is None:
            return
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._report("".join(traceback.format_exception(kind, error, trace)))
            raise SystemExit(1) from None  # nothing is to come on the console after the cause
        if error is not None:
            self._say(f"error: {error}")
        self._close()

    def _close(self) -> None:
        global _console
        sys.stdout, sys.stderr = self._streams
        for number, descriptor in enumerate(self._descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if _console is not None:
            _console.close()
            _console = None
        with suppress(OSError):
            self._file.close()

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a full disk ends no run
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _report(self, trace: str) -> None:
        assert self._folder is not None
        where = distributed.rank_and_host()
        self._say(f"{where} failed in phase '{phases.current()}':\n{trace}")
        text = f"error: {where} was the first to fail, in phase '{phases.current()}'"
        if newest := flight_recorder.history()[-1:]:
            text += f", after it began {newest[0]}"
        text += f":\n{trace}"
        flight_recorder.dump(distributed.rank())
        try:  # to make a file that is not there is one act, on a shared file system too
            with open(self._folder / FAILURE_FILE, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return
        except OSError:  # a folder that is gone or full: then every rank speaks
            pass
        stream = self._streams[1] if distributed.is_main() else console()
        with suppress(OSError):
            print(text, file=stream, flush=True)


class Tee:
    """A stream whose text goes into a file as well, but for what a progress bar overwrites.

    A write that fails ends nothing. The console may go away first, with the ssh of a launcher that
    is stopped: then there is the file, and the rank has still its checkpoint to write. Or the disk
    is full: then there is the console.
    """

    def __init__(self, stream: TextIO, file: TextIO | None = None):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        """Writes to both; returns the number of characters."""
        if self._file is not None and "\r" not in text:
            with suppress(OSError):
                self._file.write(text)
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the console; the file is written line by line."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
