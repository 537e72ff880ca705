"""What the parts of an estimator declare, and how they are found by name.

A weight rule, a leg or a baseline declares the inputs that it does not use:

    @without("needs_value")
    def leave_one_out(returns, value): ...

A function without a declaration is assumed to need everything, so user-defined rules need none.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def without(*needs: str) -> Callable[[Function], Function]:
    """Mark a function as not using some of its inputs.

    Args:
        needs: attributes to set to False on the function: of a rule "needs_pathwise",
            "needs_score", "several_legs" or "cross_fit", of a rule or a leg "categorical_nodes" or
            "more_axes", of a leg "needs_baseline", of a baseline "needs_value".
    """

    def mark(function: Function) -> Function:
        for need in needs:
            setattr(function, need, False)
        return function

    return mark


def of_at_least(samples: int) -> Callable[[Function], Function]:
    """Mark a leg or a baseline as needing some number of samples on axis 0, see `least_samples`."""

    def mark(function: Function) -> Function:
        function.least_samples = samples  # type: ignore[attr-defined]
        return function

    return mark


def least_samples(function: Callable[..., Any]) -> int:
    """The samples that a leg or a baseline needs: 1 unless it is marked with `of_at_least`."""
    return int(getattr(_unwrapped(function), "least_samples", 1))


def having(*traits: str) -> Callable[[Function], Function]:
    """Mark a function as having traits that others lack, see `has`.

    Args:
        traits: of a weight rule "takes_context", if its third argument is a `mixing.Context`
            instead of the probe alone, "compares_means", if it trusts a leg less where the legs'
            means differ, and "needs_no_leg", if its leg must be `legs.nothing`; of a leg
            "needs_graph", if it is made from a `mixing.GraphContext`, "needs_critic", if it is made
            from a critic of the node's sample, and "one_call_per_node", if it counts its calls.
    """

    def mark(function: Function) -> Function:
        for trait in traits:
            setattr(function, trait, True)
        return function

    return mark


def has(function: Callable[..., Any], trait: str) -> bool:
    """Whether a function has a trait: False unless it is marked with `having`."""
    return bool(getattr(_unwrapped(function), trait, False))


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a `functools.partial` wraps, if it is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def declared(function: Callable[..., Any], need: str) -> bool:
    """Whether a function has a need: True unless declared otherwise.

    A `functools.partial` has the needs of the function it wraps.
    """
    return bool(getattr(_unwrapped(function), need, True))


def part_named(kind: str, part: str | Function, known: Mapping[str, Function]) -> Function:
    """Look up a part of an estimator by name; a function passes through.

    Args:
        kind: what it is, for the message.
        part: a name, with hyphens or underscores, or a function.
        known: name -> function.
    Raises:
        ValueError: the name is unknown.
        TypeError: `part` is neither a name nor a function.
    """
    if callable(part):
        return part
    if not isinstance(part, str):
        raise TypeError(f"a {kind} is one of {', '.join(known)}, or a function, got {part!r}")
    if (name := part.replace("_", "-")) in known:
        return known[name]
    raise ValueError(unknown_name(part, list(known), kind))


def unknown_name(name: object, known: Sequence[str], kind: str = "estimator") -> str:
    """Error message for an unknown name, which suggests the nearest known one."""
    near = difflib.get_close_matches(str(name), known, 3)
    near.sort(key=lambda one: sorted(one) != sorted(str(name)))  # first, letters in another order
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown {kind} {name!r}: {hint}choose one of {', '.join(known)}"
