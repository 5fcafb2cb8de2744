"""`python -m scale_smog` is `smog`: for launchers that start a module."""

from scale_smog.cli.main import main

if __name__ == "__main__":
    main()
