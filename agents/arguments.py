"""Checks of PIPPS's constructor arguments: one sentence per wrong value, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor

import estimators
from estimators import ControlProbe, DenseJacobian, Estimator, assign_credit

if TYPE_CHECKING:
    from agents.pipps import PIPPS

LEGS = {"score": estimators.legs.score, "biw": estimators.legs.biw}
NO_VEC_NORMALIZE = (
    "PIPPS fits its model to raw observations, whose scale VecNormalize keeps changing; "
    "pass the environment without VecNormalize (the GP scales its inputs itself)"
)
# Variants of the 2018 paper that are not estimators of a node: (resample, fixed noise).
VARIANTS = {"gr": (True, False), "rp-fs": (False, True), "gr-fs": (True, True)}


def variant(agent: PIPPS) -> tuple[bool, bool]:
    """Whether the estimator's name asks for Gaussian resampling, and for fixed noise."""
    name = agent.estimator
    return VARIANTS.get(name, (False, False)) if isinstance(name, str) else (False, False)


def resolve(agent: PIPPS) -> Estimator:
    """The estimator of the nodes, with the agent's leg and cross_fit where it is a name."""
    if isinstance(agent.estimator, Estimator):
        return agent.estimator
    name = "rp" if agent.estimator in VARIANTS else agent.estimator
    return estimators.make(name, legs=(LEGS[agent.leg],), cross_fit=agent.cross_fit)


def check_arguments(agent: PIPPS) -> None:
    """One sentence per wrong value, before any work is done."""
    if getattr(agent, "observation_space", None) is None:
        raise ValueError("PIPPS needs an environment to learn in: pass env=... (an id or instance)")
    has_halves = getattr(agent.estimator, "cross_fit", agent.cross_fit)
    checks: list[tuple[str, Any, bool, str]] = [
        ("leg", agent.leg, agent.leg in LEGS, f"one of {', '.join(LEGS)}"),
        _whole(agent, "n_particles", 6 if has_halves else 3),
        _whole(agent, "horizon", 1),
        _whole(agent, "gradient_steps", 1),
        _whole(agent, "random_trials", 1),
        _whole(agent, "gp_evaluations", 1),
        _whole(agent, "max_points", 0),
        ("cost_fn", agent.cost_fn, agent.cost_fn is None or callable(agent.cost_fn), "a function"),
        _number(agent, "noise_multiplier", lambda x: 0 < x < math.inf, "above 0"),
        _number(agent, "adam_eps", lambda x: 0 < x < math.inf, "above 0"),
        _number(agent, "momentum", lambda x: 0 <= x < 1, "in [0, 1)"),
    ]
    if not callable(agent.learning_rate):
        checks.append(_number(agent, "learning_rate", lambda x: 0 < x < math.inf, "above 0"))
    names = ("adam", "rmsprop2018", "quasi-newton")
    checks.append(("optimizer", agent.optimizer, agent.optimizer in names, f"one of {names}"))
    for name, value, is_good, expected in checks:
        if not is_good:
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    if agent.optimizer == "quasi-newton" and not variant(agent)[1]:
        raise ValueError(
            "optimizer 'quasi-newton' needs a deterministic objective; "
            "choose estimator 'rp-fs' or 'gr-fs'"
        )
    if "angle_dims" in agent.policy_kwargs:
        raise ValueError(
            "angle_dims is for model and policy: pass it to PIPPS, not in policy_kwargs"
        )
    _check_spaces(agent)
    _check_estimator(agent)
    if agent.cost_fn is not None:
        _check_cost(agent.cost_fn, agent.observation_space.shape[0], agent.device)  # type: ignore[index]


def _check_estimator(agent: PIPPS) -> None:
    """Its parts by name, and that they work together, on a node of as many particles."""
    if isinstance(agent.estimator, Estimator):
        if agent.leg != "score" or agent.cross_fit:
            raise ValueError(
                "an Estimator brings its own legs and cross_fit: pass leg and cross_fit to "
                "estimators.make(...), not to PIPPS"
            )
    elif agent.estimator not in (known := [*estimators.names(), *VARIANTS]):
        raise ValueError(estimators.unknown_name(agent.estimator, known))
    estimator = resolve(agent)
    if estimator.whole_graph:
        return
    n = agent.n_particles
    mean = torch.zeros(n, 2, dtype=torch.float64, requires_grad=True)
    noise = torch.linspace(-1, 1, 2 * n, dtype=torch.float64).reshape(n, 2)
    one = torch.ones(n, 2, 1, dtype=torch.float64)
    probe = ControlProbe([one, one], lambda: DenseJacobian(one[:, :1]))
    x, credit = estimator(mean, torch.ones_like(mean), noise, mean.new_zeros(n), probe=probe)
    assign_credit(x.square().sum(-1), credit).sum().backward()


def _check_cost(cost: Callable[[Tensor], Tensor], states: int, device: torch.device) -> None:
    x = torch.zeros(2, 3, states, dtype=torch.float64, device=device, requires_grad=True)
    try:
        found: Any = cost(x)
    except Exception as error:  # whatever the user's function may raise
        raise ValueError(
            f"cost_fn takes states [..., {states}] and gives a cost each, but with states "
            f"[2, 3, {states}] it raised {type(error).__name__}: {error}"
        ) from error
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, 3]:
        raise ValueError(
            f"cost_fn must give one cost per state: of states [2, 3, {states}] a tensor [2, 3], "
            f"got {shape}"
        )
    if not found.requires_grad:
        raise ValueError(
            "cost_fn must be differentiable: a cost of torch operations on the states it is given"
        )


def _whole(agent: PIPPS, name: str, least: int) -> tuple[str, Any, bool, str]:
    value = getattr(agent, name)
    is_good = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    return name, value, is_good, f"at least {least}, a whole number"


def _number(
    agent: PIPPS, name: str, is_good: Callable[[float], bool], expected: str
) -> tuple[str, Any, bool, str]:
    value = getattr(agent, name)
    return name, value, isinstance(value, Real) and is_good(float(value)), f"{expected}, a number"


def _check_spaces(agent: PIPPS) -> None:
    space = agent.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"PIPPS models a vector of real numbers and needs a Box observation space of shape "
            f"[S], got {space}; wrap the environment in gymnasium.wrappers.FlattenObservation"
        )
    if len(agent.action_space.shape or ()) != 1:
        raise ValueError(f"PIPPS needs a Box action space of shape [A], got {agent.action_space}")
    if agent.get_vec_normalize_env() is not None:
        raise ValueError(NO_VEC_NORMALIZE)
    wrong = [d for d in agent.angle_dims if not 0 <= d < space.shape[0]]
    if wrong or len(set(agent.angle_dims)) < len(agent.angle_dims):
        raise ValueError(
            f"angle_dims must be entries of the observation, 0..{space.shape[0] - 1}, each once, "
            f"got {list(agent.angle_dims)}"
        )
