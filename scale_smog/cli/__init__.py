"""The program's commands, a module each: `smog X`, `python -m scale_smog X`, launcher/X.py.

A module's docstring is its help, `add_arguments` says what it takes, and `run` does it and returns
the exit status. Whatever is slow to import is imported in `run`.
"""
