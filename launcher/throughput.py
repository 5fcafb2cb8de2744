"""`smog throughput` as a file, for deepspeed, torchrun and srun."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("throughput", sys.argv[1:])
