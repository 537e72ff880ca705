"""Checks of constructor arguments that environments share, each with one sentence for an error."""

import math
from numbers import Real
from typing import Any


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless the value, type included, is one of the choices.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        choices: what may be passed.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = " or ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} is unknown: pass {allowed}.")


def check_number(name: str, value: Any, expected: str, *, positive: bool = False) -> float:
    """The value as a float; raise ValueError unless it is a finite number >= 0.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        expected: what may be passed, for the message.
        positive: refuse 0, too.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r} is out of range: pass {expected}.")
    return float(value)
