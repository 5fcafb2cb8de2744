"""Writes the built-in labelled images, with which `smog demo` begins."""

import sys

from scale_smog.cli.main import run_command

if __name__ == "__main__":
    run_command("make_demo", sys.argv[1:])
