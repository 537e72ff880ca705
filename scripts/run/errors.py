"""How a script ends when something is wrong: one sentence and exit code 1, never a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right; scripts print it as one sentence and exit."""


@contextlib.contextmanager
def ending_with_a_sentence(*also: type[Exception]) -> Iterator[None]:
    """A UserError, or another of these errors, ends the script."""
    try:
        yield
    except (UserError, *also) as error:  # type: ignore[misc]  # a tuple of exception types
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
