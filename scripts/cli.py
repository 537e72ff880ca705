"""The command `totalprop`, with one subcommand per script.

A script is imported when it is called, and not for its help.
"""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module

import totalprop
from totalprop.scripts.commands import COMMANDS, parser_of, train_usage
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.run.threads import wait_passively

_FORMAT_WARNING = warnings.formatwarning
STUDY = "study"  # the first word of commands that have two


def usage() -> str:
    """The text of `totalprop --help`."""
    return _listing(
        "totalprop COMMAND",
        "Reinforcement-learning agents with interchangeable policy-gradient estimators.",
        {name: command.text for name, command in COMMANDS.items()},
        "totalprop COMMAND --help lists a command's options.\n"
        "To get started: totalprop train pipps",
    )


def studies() -> str:
    """The text of `totalprop study --help`."""
    first = f"{STUDY} "
    return _listing(
        "totalprop study NAME",
        "Studies of several runs or measurements, each with a table and figures of its own.",
        {
            name.removeprefix(first): c.text
            for name, c in COMMANDS.items()
            if name.startswith(first)
        },
        "totalprop study NAME --help lists a study's options.",
    )


def _listing(command: str, about: str, texts: Mapping[str, str], next_steps: str) -> str:
    """A usage line, and a line for each name."""
    width = max(map(len, texts))
    lines = [f"  {name:<{width}}  {text}" for name, text in texts.items()]
    return "\n".join([f"usage: {command} [...]", "", about, "", *lines, "", next_steps])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console command and of `python -m totalprop`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    name = arguments[0]
    if name == "--version":
        print(f"totalprop {totalprop.__version__}")
        return
    if name == STUDY:
        if not arguments[1:] or arguments[1] in ("-h", "--help"):
            print(studies())
            raise SystemExit(0 if arguments[1:] else 2)
        name, arguments = " ".join(arguments[:2]), arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = ", ".join(COMMANDS)
        print(f"error: unknown command '{name}': {hint}choose one of {known}", file=sys.stderr)
        raise SystemExit(2)
    wait_passively()
    warnings.formatwarning = _say_warning
    sys.argv[0] = f"totalprop {name}"  # the program name that argparse prints
    command, arguments = COMMANDS[name], arguments[1:]
    if name == "train" and arguments[:1] in (["-h"], ["--help"]):
        print(train_usage())
        raise SystemExit(0)
    if command.add_flags is not None and _asks_for_help(arguments):
        parser_of(name).parse_args(["--help"])
    try:
        import_module(f"totalprop.scripts.{command.module}").main(arguments)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        if _can_print():  # another pipe's, such as a worker's
            raise
        # As in `totalprop reproduce | head`; nothing is to be flushed at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _say_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    line: str | None = None,
) -> str:  # fmt: skip
    """One sentence for whoever typed a command; who calls a library wrongly needs the place."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _FORMAT_WARNING(message, category, filename, lineno, line)


def _can_print() -> bool:
    """Whether somebody still reads what this process prints."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(split_flags(arguments)[0])


if __name__ == "__main__":
    main()
