"""Errors that end a script with one line and an exit code instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """An error that the user can fix; scripts print its message as one line and exit."""


class UsageError(UserError):
    """The command line names what does not exist; scripts exit with 2, as for a wrong flag."""


@contextlib.contextmanager
def ending_with_a_sentence(*also: type[Exception]) -> Iterator[None]:
    """Print a UserError or an error of one of the types in `also`; exit with 1, or 2 for usage."""
    try:
        yield
    except (UserError, *also) as error:  # type: ignore[misc]  # a tuple of exception types
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


@contextlib.contextmanager
def continuing_later() -> Iterator[None]:
    """For a command that continues where it was stopped: Ctrl-C says so and exits with 130.

    Errors end with a sentence, as in `ending_with_a_sentence`.
    """
    try:
        with ending_with_a_sentence():
            yield
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None
