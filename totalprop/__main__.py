"""Runs the command `totalprop` for `python -m totalprop`."""

from totalprop.scripts.cli import main

if __name__ == "__main__":
    main()
