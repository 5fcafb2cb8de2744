"""`smog export` as a file."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("export", sys.argv[1:])
