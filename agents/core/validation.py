"""Checks shared by all agents: constructor arguments, what environments return, gradients."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from totalprop.agents.core.spaces import refuse_whole_numbers
from totalprop.agents.persistence.safe_file import shown
from totalprop.estimators import (
    ControlProbe,
    DenseJacobian,
    Estimator,
    assign_credit,
    gradient,
)


@dataclass(frozen=True)
class AtLeast:
    """Range of an argument, written in its annotation: `horizon: Annotated[int, AtLeast(2)]`.

    An `int` must then be a whole number, a `float` a finite one; NumPy's numbers count, too.
    """

    low: float

    def __contains__(self, value: float) -> bool:
        return value >= self.low

    def __str__(self) -> str:
        return f"at least {self.low:g}"

    @property
    def symbol(self) -> str:
        """As help texts show it."""
        return f"≥ {self.low:g}"


@dataclass(frozen=True)
class Above:
    """Numbers above a bound."""

    low: float

    def __contains__(self, value: float) -> bool:
        return value > self.low

    def __str__(self) -> str:
        return f"above {self.low:g}"

    @property
    def symbol(self) -> str:
        """As help texts show it."""
        return f"> {self.low:g}"


@dataclass(frozen=True)
class Within:
    """Numbers in [low, high], without a bound that is open."""

    low: float
    high: float
    open_above: bool = False
    open_below: bool = False

    def __contains__(self, value: float) -> bool:
        if value in (self.low, self.high):
            return not (self.open_below if value == self.low else self.open_above)
        return self.low < value < self.high

    def __str__(self) -> str:
        left, right = "(" if self.open_below else "[", ")" if self.open_above else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"

    @property
    def symbol(self) -> str:
        """As help texts show it."""
        return str(self)


@dataclass(frozen=True)
class ZeroOrAtLeast:
    """0, which stands for "all" or "none", or a number that is large enough."""

    low: float

    def __contains__(self, value: float) -> bool:
        return value == 0 or value >= self.low

    def __str__(self) -> str:
        return f"0 or at least {self.low:g}"

    @property
    def symbol(self) -> str:
        """As help texts show it."""
        return f"0 or ≥ {self.low:g}"


@dataclass(frozen=True)
class Finite:
    """Any finite number."""

    def __contains__(self, value: float) -> bool:
        return True

    def __str__(self) -> str:
        return "a finite number"

    symbol = ""


RANGES = (AtLeast, Above, Within, ZeroOrAtLeast, Finite)


@functools.cache
def constructor_hints(cls: type) -> dict[str, Any]:
    """Annotations of the constructor's arguments by name, ranges included.

    Subclasses inherit what they do not declare, stable-baselines3's own classes are left out.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and not base.__module__.startswith("stable_baselines3."):
            # stable-baselines3's alias GymEnv names VecEnv by a string.
            names = {"VecEnv": VecEnv}
            found |= _hints(vars(base)["__init__"], names)
    found.pop("return", None)
    return found


def _hints(function: Callable[..., Any], names: dict[str, Any]) -> dict[str, Any]:
    """Its annotations, without those that name what is imported for type checkers only."""
    try:
        return get_type_hints(function, localns=names, include_extras=True)
    except NameError:
        found: dict[str, Any] = {}
        for name, hint in function.__annotations__.items():

            def alone() -> None: ...

            alone.__annotations__ = {name: hint}
            with contextlib.suppress(NameError):
                own = {**getattr(function, "__globals__", {}), **names}
                found |= get_type_hints(alone, own, include_extras=True)
        return found


def expectation(hint: Any, value: Any, *, exact: bool = False) -> str:
    """What an annotation asks for where the value is not that; "" where it is.

    Known are ranges (`Annotated[float, Above(0)]`), choices (`Literal`), `bool`, and their unions
    with None and functions; any other annotation allows everything.

    Args:
        hint: the annotation.
        value: what was given.
        exact: check numbers without a range, strings, collections and classes, too, which values
            from files may not be; callers of constructors find out.
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    expected = ""
    for member in members:
        wanted = [r for r in getattr(member, "__metadata__", ()) if isinstance(r, RANGES)]
        if wanted:
            kind = get_args(member)[0]
            is_kind = is_whole if kind is int else is_finite
            if is_kind(value) and all(value in r for r in wanted):
                return ""
            is_infinite = isinstance(value, Real) and not math.isfinite(value)
            note = ", a whole number" if kind is int else ", a finite number" if is_infinite else ""
            expected = expected or " and ".join(map(str, wanted)) + note
        elif get_origin(member) is Literal:
            choices = get_args(member)
            if isinstance(value, str) and value in choices:
                return ""
            expected = expected or f"one of {', '.join(choices)}"
        elif member is bool:
            if isinstance(value, bool | np.bool_):
                return ""
            expected = expected or "True or False"
        elif member in (None, type(None)):
            if value is None:
                return ""
        elif get_origin(member) is Callable:
            if callable(value):
                return ""
            expected = expected or "a function"
        elif not exact or _is_instance(member, value):
            return ""
        else:
            expected = expected or _NAMES.get(member, f"a {getattr(member, '__name__', member)}")
    return expected or "None"


_NAMES = {int: "a whole number", float: "a finite number", str: "a text"}


def _is_instance(member: Any, value: Any) -> bool:
    """Whether a value is of a type as annotations write it, entries of tuples included."""
    if hasattr(member, "__metadata__"):
        member = get_args(member)[0]
    if member is Any:
        return True
    if member is int:
        return isinstance(value, Integral)  # verbose=True, too
    if member is float:
        return is_finite(value)
    origin, entries = get_origin(member) or member, get_args(member)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(
            not expectation(entries[0], entry, exact=True) for entry in value
        )
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return isinstance(value, origin)


class WrongArgumentError(ValueError, AssertionError):
    """An argument has a wrong value; stable-baselines3 raises AssertionError for some."""


def check_arguments(agent: BaseAlgorithm) -> None:
    """Every argument against its annotation, and what stable-baselines3 does not check.

    Raises:
        ValueError: one sentence with the argument, what was expected and the value.
    """
    if getattr(agent, "observation_space", None) is None:
        raise ValueError(
            f"{type(agent).__name__} needs an environment to learn in: pass env=... "
            "(an id or instance)"
        )
    refuse_whole_numbers(agent.action_space)
    names = constructor_hints(type(agent))
    values = {name: getattr(agent, name) for name in names if hasattr(agent, name)}
    if "stats_window_size" in names:  # not if the constructor is stable-baselines3's
        values["stats_window_size"] = agent._stats_window_size
    check_values(type(agent), **values)


def check_values(cls: type, **values: Any) -> None:
    """Arguments of a constructor against its annotations.

    Raises:
        ValueError: one sentence with the argument, what was expected and the value.
    """
    hints = constructor_hints(cls)
    for name, value in values.items():
        if expected := expectation(hints[name], value):
            raise WrongArgumentError(f"{name} must be {expected}, got {shown(value)}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, NumPy's included; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any) -> int:
    """The value as an int, if it is a whole number, also one written as a float (1e5).

    Raises:
        ValueError: it is none.
    """
    if is_whole(value) or (is_finite(value) and float(value).is_integer()):
        return int(value)
    raise ValueError(f"{name} must be a whole number, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, NumPy's included; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def try_estimator(
    estimator: Estimator,
    samples: Sequence[int],
    *,
    has_value: bool = False,
    has_critic: bool = False,
    is_categorical: bool = False,
) -> None:
    """One node of so many samples, forward and backward, in place of a failure after the data.

    What works with 100 samples works with more.

    Args:
        samples: the node's shape without its last axis. has_value: a critic's estimate is there.
        has_critic: there is a critic of the node's sample, too.
        is_categorical: each sample consists of several categorical variables.
    Raises:
        ValueError: the estimator's parts do not work together, or not with so few samples.
    """
    if estimator.needs_critic and not has_critic:
        raise ValueError(
            "the legs 'lax' and 'mvd' need a critic of the sample, which this agent has not: "
            "use legs='score', or DreamerTPX"
        )
    samples = [min(n, 100) for n in samples]
    shape = (*samples, 2, 2) if is_categorical else (*samples, 2)
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    noise = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)
    probe = None
    if len(samples) == 1:
        one = torch.ones(*shape, 1, dtype=torch.float64)
        control = one.flatten(1)[:, :1].unsqueeze(-1)
        jacobians = [one] if is_categorical else [one, one]
        probe = ControlProbe(jacobians, lambda: DenseJacobian(control))
    value = noise.flatten(len(samples))[..., 0] if has_value else None

    def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
        mean = parameter.expand(shape)
        x, credit = estimator(
            mean, None if is_categorical else torch.ones_like(mean), noise,
            mean.new_zeros(samples), probe=probe, value=value, critic=_first, tap=tap,
        )  # fmt: skip
        return assign_credit(x.square().flatten(len(samples)).sum(-1), credit).mean()

    gradient(rollout, [parameter], estimator, samples=samples[0])


def _first(x: Tensor) -> Tensor:
    """[N, ..., D] -> [N, ...], a critic."""
    return x[..., 0]


def check_finite(
    step: int,
    observations: np.ndarray | dict[str, np.ndarray],
    rewards: np.ndarray | None = None,
    infos: Sequence[dict[str, Any]] = (),
    dones: Sequence[bool] | np.ndarray = (),
) -> None:
    """Raise ValueError if what environments returned is not finite.

    Terminal observations count where an episode is done; elsewhere they mean nothing.
    """
    ends = [
        info.get("terminal_observation") for info, done in zip(infos, dones, strict=True) if done
    ]
    seen: list[tuple[str, Any]] = []
    for observation in (observations, *(end for end in ends if end is not None)):
        parts = observation.values() if isinstance(observation, dict) else [observation]
        seen += [("observation", np.asarray(part)) for part in parts]
    if rewards is not None:
        seen.append(("reward", rewards))
    for name, values in seen:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"the environment returned a non-finite {name} at step {step}: "
                f"{values.tolist()}; fix the environment (or end its episode before that)"
            )


def check_gradients(
    step: int, update: int, norms: Mapping[str, Tensor], remedies: Mapping[str, str]
) -> None:
    """Raise FloatingPointError if the norm of a part's gradient is not finite.

    Args:
        step: of the environment.
        update: of those already made.
        norms: [] of each part.
        remedies: what can be changed for each part, to end "Go on from a checkpoint with".
    """
    for name, norm in norms.items():
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the {name}'s gradient was not finite at step {step}, update {update}; the step "
                f"was not taken. Go on from a checkpoint with {remedies[name]}"
            )
