"""`smog pretrain` as a file, for deepspeed, torchrun and srun."""

import signal
import sys

# Importing takes seconds: until the run listens, these two wait.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

from scale_smog.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("pretrain", sys.argv[1:])
