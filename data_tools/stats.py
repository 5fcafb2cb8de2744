"""`smog stats` as a file."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("stats", sys.argv[1:])
