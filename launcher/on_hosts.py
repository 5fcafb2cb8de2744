"""`deepspeed --hostfile`, but stopping this run never ends another: `on_hosts.py --hostfile H ...`.

Takes what `deepspeed` takes. When a run is stopped, DeepSpeed ends everything on its hosts that has
the run's interpreter path and its launcher's name, other runs of the same environment included. So
this one gets a path of its own: a link beside the interpreter, which all hosts must see (a shared
file system), removed at the end.
"""

import argparse
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from scale_smog.errors import UserError, exits_on_user_error


def main() -> int:
    if set(sys.argv[1:]) <= {"-h", "--help"}:
        print(__doc__)
        return 0
    _refuse_missing_hostfile(sys.argv[1:])
    interpreter = Path(sys.executable)
    own = interpreter.with_name(f"python-{uuid.uuid4().hex[:8]}")
    try:
        own.symlink_to(interpreter.name)
    except OSError as error:
        raise UserError(f"cannot make the link {own}: {error.strerror}") from None
    try:
        return _run([str(own), "-m", "deepspeed.launcher.runner", *sys.argv[1:]])
    finally:
        own.unlink(missing_ok=True)


def _refuse_missing_hostfile(arguments: list[str]) -> None:
    """deepspeed only warns of it, and trains on this machine alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-H", "--hostfile")
    hostfile = parser.parse_known_args(arguments)[0].hostfile
    if hostfile and not Path(hostfile).is_file():
        raise UserError(f"no hostfile {hostfile}: a line a host, such as 'node1 slots=8'")


def _run(command: list[str]) -> int:
    """Runs deepspeed in its own process group and passes signals on, once each."""
    job = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, frame: object) -> None:
        del frame
        if job.poll() is None:
            os.kill(job.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return job.wait()


if __name__ == "__main__":
    with exits_on_user_error():
        status = main()
    raise SystemExit(abs(status))
