"""`smog index` as a file."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("index", sys.argv[1:])
