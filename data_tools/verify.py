"""`smog verify` as a file."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("verify", sys.argv[1:])
