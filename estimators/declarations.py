"""What a rule or a baseline does without, declared on the function itself.

    @without("needs_value")
    def leave_one_out(returns, value): ...

A function that declares nothing is given everything, so a user's own needs no declaration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def without(*needs: str) -> Callable[[Function], Function]:
    """Decorate a function to declare what it never looks at."""

    def mark(function: Function) -> Function:
        for need in needs:
            setattr(function, need, False)
        return function

    return mark


def declared(function: Callable[..., Any], need: str) -> bool:
    """Whether a function has that need; partial applications have their function's."""
    while isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, need, True))
