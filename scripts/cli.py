"""The command `totalprop`: one subcommand per script, which is imported only when it is called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

# name: (module in totalprop.scripts, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train an agent, or resume a run"),
    "evaluate": ("evaluate", "evaluate a trained run and record a GIF"),
    "doctor": ("doctor", "check versions, rendering, GPU and disk, with a remedy per line"),
    "diagnose": ("studies.diagnose", "which estimator does this trained world model need?"),
    "variance": ("studies.variance", "more actions or more states? DAAPPO's gradient taken apart"),
    "sweep": ("studies.sweep", "many runs: estimators x seeds, a table and learning curves"),
    "chaos": ("studies.chaos", "gradient variance on chaotic networks, every estimator"),
    "bench": ("bench.pipps", "time updates against named peers"),
    "kill-test": ("reliability.kill_test", "kill runs at random and compare with undisturbed ones"),
    "fingerprint": (
        "reliability.fingerprint",
        "hash what seeded runs end in, before and after a change",
    ),
    "soak": ("reliability.soak", "train for a long time and watch memory, speed and files"),
}


def usage() -> str:
    """The text of `totalprop --help`."""
    lines = [f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: totalprop COMMAND [...]",
            "",
            "Reinforcement-learning agents whose policy-gradient estimator is a plug-in.",
            "",
            *lines,
            "",
            "totalprop COMMAND --help lists a command's flags. To begin: totalprop train pipps",
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
    sys.argv[0] = f"totalprop {name}"  # what argparse calls the program
    import_module(f"totalprop.scripts.{COMMANDS[name][0]}").main(arguments[1:])


if __name__ == "__main__":
    main()
