"""The command `totalprop`, with one subcommand per script; a script is imported when called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from totalprop.scripts.run.threads import wait_passively

# name: (module in totalprop.scripts, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train an agent, or resume a run"),
    "evaluate": ("evaluate", "evaluate a trained run and record a GIF of its policy"),
    "doctor": ("doctor", "check versions, rendering, GPU and disk space, and suggest fixes"),
    "diagnose": ("studies.diagnose", "compare the estimators' accuracy on a trained world model"),
    "variance": ("studies.variance", "decompose DAAPPO's variance: more actions or more states?"),
    "sweep": ("studies.sweep", "train estimators x seeds; write a table and learning curves"),
    "chaos": ("studies.chaos", "measure every estimator's gradient variance on chaotic RNNs"),
    "bench": ("bench.pipps", "time gradients and updates against other libraries"),
    "kill-test": ("reliability.kill_test", "kill and resume runs; compare with undisturbed ones"),
    "fingerprint": (
        "reliability.fingerprint",
        "hash the results of seeded runs, to compare two commits",
    ),
    "soak": ("reliability.soak", "train for an hour and monitor memory and open files"),
}


def usage() -> str:
    """The text of `totalprop --help`."""
    lines = [f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: totalprop COMMAND [...]",
            "",
            "Reinforcement-learning agents with interchangeable policy-gradient estimators.",
            "",
            *lines,
            "",
            "totalprop COMMAND --help lists a command's options.",
            "To get started: totalprop train pipps",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console command and of `python -m totalprop`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    name = arguments[0]
    if name == "--version":
        from importlib.metadata import version

        print(f"totalprop {version('totalprop')}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = ", ".join(COMMANDS)
        print(f"error: unknown command '{name}': {hint}choose one of {known}", file=sys.stderr)
        raise SystemExit(2)
    wait_passively()
    sys.argv[0] = f"totalprop {name}"  # the program name that argparse prints
    import_module(f"totalprop.scripts.{COMMANDS[name][0]}").main(arguments[1:])


if __name__ == "__main__":
    main()
