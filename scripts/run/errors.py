"""Errors that end a script with one line and an exit code instead of a traceback."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """An error that the user can fix; scripts print its message as one line and exit."""


class UsageError(UserError):
    """The command line names what does not exist; scripts exit with 2, as for a wrong flag."""


@contextlib.contextmanager
def ending_with_a_sentence(*also: type[Exception]) -> Iterator[None]:
    """Print an error of the user, of files or of a type in `also`; exit with 1, or 2 for usage."""
    try:
        yield
    except (UserError, OSError, *also) as error:  # type: ignore[misc]  # a tuple of types
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


@contextlib.contextmanager
def continuing_later() -> Iterator[None]:
    """For a command that continues where it was stopped: Ctrl-C says so and exits with 130.

    Errors end with a sentence, as in `ending_with_a_sentence`. SIGTERM is like Ctrl-C, with 143.
    """
    try:
        with ending_with_a_sentence():
            yield
    except KeyboardInterrupt as stop:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM, see `sigterm_stops`."""


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """Let SIGTERM raise what `continuing_later` waits for; outside of the main thread nothing."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
