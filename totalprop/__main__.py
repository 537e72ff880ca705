"""`python -m totalprop`: the command `totalprop`."""

from totalprop.scripts.cli import main

if __name__ == "__main__":
    main()
