"""The one exception for mistakes a user can mend, and how programs report it."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HOLD_BACK_S = 5.0  # a launcher that sees rank 0 fail has ended the other ranks by then


class UserError(ValueError):
    """One clear line naming the key, file or sample and the nearest right answer."""


class CommonError(UserError):
    """A mistake that all ranks are known to meet: rank 0 says it."""


class RunEnded(UserError):
    """A run has ended for good before its last step: more time would not mend it."""


class RankError(UserError):
    """A mistake that one rank alone meets: the rank that has it says it."""


def first_few(names: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    """Names in a row, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


@contextmanager
def exits_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit status 2, without a traceback.

    Under a launcher every rank exits, but only rank 0 prints what all have met. Before ranks have
    met nobody knows who else has a mistake, such as an override that was typed on one host: the
    first rank of each host prints it too, unless rank 0's end has ended that rank.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
        text = " ".join(str(error).split())
        if rank == "0" or isinstance(error, RankError):
            print(f"error: {text}", file=sys.stderr, flush=True)
        elif not isinstance(error, CommonError):
            # The launcher may end this rank meanwhile; that another of its host ends would make it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            time.sleep(HOLD_BACK_S if local_rank == "0" else 1.2 * HOLD_BACK_S)
            if local_rank == "0":
                print(f"error: {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
