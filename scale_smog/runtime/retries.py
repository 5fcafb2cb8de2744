"""Once more: what a shared file system answers while it fails over is no end."""

import errno
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
RETRY_S = (1, 5, 20)


def retry_transient_errors(read: Callable[[], T], what: object) -> T:
    """What `read` returns; it is called again after an error that may pass.

    Raises:
        OSError: another one, or the last.
    """
    for pause_s in RETRY_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
            with suppress(OSError):
                print(f"cannot read {what}: {error.strerror}; once more", file=sys.stderr)
            time.sleep(pause_s)
    return read()
