"""`deepspeed --hostfile`, but stopping this run never ends another: `on_hosts.py --hostfile H ...`.

Takes what `deepspeed` takes. When a run is stopped, DeepSpeed ends everything on its hosts that has
the run's interpreter path and its launcher's name, other runs of the same environment included. So
this one gets a path of its own: a link beside the interpreter, which all hosts must see (a shared
file system), removed at the end.
"""

import argparse
import sys
import uuid
from pathlib import Path

from scale_smog.errors import UserError, exits_on_user_error
from scale_smog.runtime.child import run_child


def main() -> int:
    if set(sys.argv[1:]) <= {"-h", "--help"}:
        print(__doc__)
        return 0
    _check_hosts(sys.argv[1:])
    interpreter = Path(sys.executable)
    own = interpreter.with_name(f"python-{uuid.uuid4().hex[:8]}")
    try:
        own.symlink_to(interpreter.name)
    except OSError as error:
        raise UserError(f"cannot make the link {own}: {error.strerror}") from None
    try:
        return run_child([str(own), "-m", "deepspeed.launcher.runner", *sys.argv[1:]])
    finally:
        own.unlink(missing_ok=True)


def _check_hosts(arguments: list[str]) -> None:
    """Of a missing hostfile deepspeed only warns, and trains on this machine alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-H", "--hostfile")
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    given = parser.parse_known_args(arguments)[0]
    if given.include and given.exclude:
        raise UserError("--include and --exclude do not go together")
    if not given.hostfile:
        return
    if not Path(given.hostfile).is_file():
        raise UserError(f"no hostfile {given.hostfile}: a line a host, such as 'node1 slots=8'")
    lines = [
        line.partition("#")[0].split() for line in Path(given.hostfile).read_text().splitlines()
    ]
    hosts = [words[0] for words in lines if words]
    for part in filter(None, (given.include or given.exclude).split("@")):
        name = part.partition(":")[0].strip()
        if name not in hosts:
            raise UserError(f"no host '{name}' in {given.hostfile}: it has {', '.join(hosts)}")


if __name__ == "__main__":
    with exits_on_user_error():
        status = main()
    raise SystemExit(status)
