"""The parser of the commands' flags, and the types of their values. Nothing here loads PyTorch."""

from __future__ import annotations

import contextlib
import math
import os
import re
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(ArgumentParser):
    """Says what is wrong in one sentence, takes 1e5 for an integer, and tells the defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Like argparse's."""
        super().__init__(*args, **kwargs)
        self.register("type", int, integer)

    def add_argument(self, *names: Any, **kwargs: Any) -> Action:
        """Like argparse's, with the default at the end of a help text that does not name it."""
        default = kwargs.get("default")
        text = kwargs.get("help")
        named = (
            default in (None, SUPPRESS, "", []) or default is False or "(default: " in (text or "")
        )
        if text and not named:
            kwargs["help"] = f"{text} (default: {_words(default)})"
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those after --, which are for `totalprop train`."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _words(default: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(default, list):
        return " ".join(map(_words, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


class NotAnInteger(ArgumentTypeError, ValueError):
    """For argparse, which shows the text of its own error alone, and for tyro."""


def integer(text: str) -> int:
    """The integer that a flag is given as, which may be written as 1e5.

    Raises:
        NotAnInteger: the text is no integer.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise NotAnInteger(f"{text!r} is not an integer, such as 100000 or 1e5")


def at_least(least: int) -> Callable[[str], int]:
    """The type of integers from here on."""

    def parse(text: str) -> int:
        if (number := integer(text)) < least:
            raise ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return parse


def seed(text: str) -> int:
    """An integer that NumPy, PyTorch and Gymnasium all take for a seed."""
    if not 0 <= (number := integer(text)) < 2**32:
        raise ArgumentTypeError(f"must be at least 0 and below 2^32, got {number}")
    return number


def real(
    *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The type of finite numbers between bounds, which are numbers, too, but for `above`."""
    bounds = {"above": above, "at least": least, "at most": most}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
    rule = " and ".join(words) or "finite"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a number, such as 0.5") from None
        if not (math.isfinite(number) and above < number and least <= number <= most):
            raise ArgumentTypeError(f"must be {rule}, got {number:g}")
        return number

    return parse


def new_folder(text: str) -> Path:
    """A folder that results are written to, which can be made if there is none.

    Raises:
        ArgumentTypeError: it is a file or lies in one, or nothing may be written there.
    """
    path = Path(text)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is no folder"
        raise ArgumentTypeError(f"cannot write to {path}: {there} {reason}; choose another")
    return path


def new_file(text: str) -> Path:
    """A file that results are written to, whose folder can be made; see `new_folder`."""
    path = Path(text)
    new_folder(str(path.absolute().parent))
    if path.is_dir():
        raise ArgumentTypeError(f"cannot write to {path}: it is a folder; name a file in it")
    return path
