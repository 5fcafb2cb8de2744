"""A program that this one starts, waits for and passes signals on to."""

import os
import signal
import subprocess
from collections.abc import Sequence

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run_child(command: Sequence[str]) -> int:
    """Runs a command to its end, in a session of its own; signals reach it once each.

    `subprocess.run` would kill it a quarter of a second after Ctrl-C, whatever it has to save. A
    terminal that closes tells it to stop, too.

    Returns:
        Its exit status; 128 + N, as a shell has it, if signal N ended it.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # came before there was a child

    def forward(number: int, frame: object) -> None:
        del frame
        if child is None:
            early.append(number)
        elif child.poll() is None:
            is_ours = number in (signal.SIGINT, signal.SIGTERM)
            os.kill(child.pid, number if is_ours else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    child = subprocess.Popen(command, start_new_session=True)
    for number in early:
        forward(number, None)
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 - status if status < 0 else status
