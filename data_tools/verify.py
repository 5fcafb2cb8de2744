"""Checks a dataset folder: python data_tools/verify.py OUT; exit status 0 only if all is well."""

import argparse
import sys

from scale_smog.data.prepare.verify import verify_folder
from scale_smog.errors import exits_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Checks every hash, index, label and image of a dataset folder."
    )
    parser.add_argument("out", help="dataset folder")
    out = parser.parse_args().out
    with exits_on_user_error():
        problems = verify_folder(out)
    for problem in problems:
        print(problem)
    print(f"{out}: {f'{len(problems)} problems' if problems else 'all is well'}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
