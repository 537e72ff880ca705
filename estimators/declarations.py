"""Declarations of the inputs that a weight rule or a baseline does not use.

    @without("needs_value")
    def leave_one_out(returns, value): ...

A function without a declaration is assumed to need everything, so user-defined rules need none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def without(*needs: str) -> Callable[[Function], Function]:
    """Mark a function as not using some of its inputs.

    Args:
        needs: attributes to set to False on the function, such as "needs_value".
    """

    def mark(function: Function) -> Function:
        for need in needs:
            setattr(function, need, False)
        return function

    return mark


def declared(function: Callable[..., Any], need: str) -> bool:
    """Whether a function has a need: True unless declared otherwise.

    A `functools.partial` has the needs of the function it wraps.
    """
    while isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, need, True))
