"""Command lines: train, evaluate, sweep, chaos, bench. Each is `python -m scripts.NAME --help`."""
