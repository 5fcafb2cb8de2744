"""Writes a run as one page, RUN/report.html: `smog report RUN`.

Course, groups, views, recipe beside the paper's values, machine, checkpoints and evaluations, in
one file that opens from disk without a network. `smog report --several RUN RUN ...` overlays runs.
"""

import argparse
from pathlib import Path

from scale_smog.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs and the file."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--several", action="store_true", help="overlay the runs on one page")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: RUN/report.html, or report.html here)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    from scale_smog.report.page import REPORT_FILE, write_comparison, write_report

    if arguments.several:
        page = write_comparison(arguments.runs, arguments.out or Path(REPORT_FILE))
    elif len(arguments.runs) == 1:
        page = write_report(arguments.runs[0], arguments.out)
    else:
        raise UserError("give one RUN, or --several")
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")
    return 0
