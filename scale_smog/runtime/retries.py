"""Reads that are tried again: a network file system fails for a moment while it fails over."""

import errno
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

TRANSIENT_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
RETRY_DELAYS_S = (1, 5, 20)


def retry_transient_errors(read: Callable[[], T], what: object) -> T:
    """What `read` returns; it is called again after an error that may be transient.

    Args:
        read: to be called, up to four times.
        what: is read, for the warning.

    Raises:
        OSError: another one, or the last.
    """
    for delay_s in RETRY_DELAYS_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            with suppress(OSError):
                print(f"cannot read {what}: {error.strerror}; retrying", file=sys.stderr)
            time.sleep(delay_s)
    return read()
