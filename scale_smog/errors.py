"""The one exception for mistakes a user can mend, and how programs report it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """One clear line naming the key, file or sample and the nearest right answer."""


class RankError(UserError):
    """A mistake that one rank alone meets: the rank that has it says it."""


@contextmanager
def exits_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit status 2, without a traceback.

    Under a launcher every rank exits, but only rank 0 prints what all have met.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or isinstance(error, RankError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
