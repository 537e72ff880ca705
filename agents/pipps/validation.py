"""Checks of PIPPS's constructor arguments: one sentence per wrong value, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymnasium import spaces

from totalprop import estimators
from totalprop.agents.core.validation import (
    check_common,
    is_above,
    is_whole,
    is_within,
    try_estimator,
)
from totalprop.agents.pipps import problem as task
from totalprop.estimators import Estimator

if TYPE_CHECKING:
    from totalprop.agents.pipps.agent import PIPPS

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
    changes: dict[str, Any] = {}  # only what was asked for: a registered estimator has its own
    if agent.leg != "score":
        changes["legs"] = (LEGS[agent.leg],)
    if agent.cross_fit:
        changes["cross_fit"] = True
    return estimators.make("rp" if agent.estimator in VARIANTS else agent.estimator, **changes)


def check_arguments(agent: PIPPS) -> None:
    """One sentence per wrong value, before any work is done."""
    check_common(agent)
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
        _above_zero(agent, "noise_multiplier"),
        _above_zero(agent, "adam_eps"),
        ("momentum", (m := agent.momentum), is_within(m, 0, 1) and m < 1, "in [0, 1), a number"),
    ]
    if not callable(agent.learning_rate):
        checks.append(_above_zero(agent, "learning_rate"))
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
    if agent.cost_fn is None:
        task.own_cost(agent)  # warns now, not after the first trial
        return
    states: int = agent.observation_space.shape[0]  # type: ignore[index]
    problem = task.cost_problem(agent.cost_fn, states, agent.device)
    if problem is not None:
        raise ValueError(f"cost_fn is not a cost of states: {problem}")


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
    try_estimator(resolve(agent), [agent.n_particles])


def _whole(agent: PIPPS, name: str, least: int) -> tuple[str, Any, bool, str]:
    value = getattr(agent, name)
    return name, value, is_whole(value, least), f"at least {least}, a whole number"


def _above_zero(agent: PIPPS, name: str) -> tuple[str, Any, bool, str]:
    value = getattr(agent, name)
    return name, value, is_above(value, 0), "above 0, a number"


def _check_spaces(agent: PIPPS) -> None:
    space = agent.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"PIPPS models a vector of real numbers and needs a Box observation space of shape "
            f"[S], got {space}; wrap the environment in gymnasium.wrappers.FlattenObservation"
        )
    actions: Any = agent.action_space
    if (
        len(actions.shape) != 1
        or actions.dtype.kind != "f"
        or not (actions.low < actions.high).all()
    ):
        raise ValueError(
            "PIPPS needs a Box action space of shape [A], of real numbers, each with some room "
            f"between its bounds, got {actions}"
        )
    if agent.get_vec_normalize_env() is not None:
        raise ValueError(NO_VEC_NORMALIZE)
    wrong = [d for d in agent.angle_dims if not 0 <= d < space.shape[0]]
    if wrong or len(set(agent.angle_dims)) < len(agent.angle_dims):
        raise ValueError(
            f"angle_dims must be entries of the observation, 0..{space.shape[0] - 1}, each once, "
            f"got {list(agent.angle_dims)}"
        )
