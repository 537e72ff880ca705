"""The subcommands of `totalprop`, listed in `cli.py`. Each prints its options with `--help`."""
