"""Errors that end a script with one line and exit code 1 instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """An error that the user can fix; scripts print its message as one line and exit."""


@contextlib.contextmanager
def ending_with_a_sentence(*also: type[Exception]) -> Iterator[None]:
    """Print a UserError, or an error of one of the types in `also`, and exit with code 1."""
    try:
        yield
    except (UserError, *also) as error:  # type: ignore[misc]  # a tuple of exception types
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
