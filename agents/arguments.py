"""Checks of PIPPS's constructor arguments: one sentence per wrong value, before any work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gymnasium import spaces

import estimators

if TYPE_CHECKING:
    from agents.pipps import PIPPS

LEGS = {"score": estimators.legs.score, "biw": estimators.legs.biw}
NO_VEC_NORMALIZE = (
    "PIPPS fits its model to raw observations, whose scale VecNormalize keeps changing; "
    "pass the environment without VecNormalize (the GP scales its inputs itself)"
)
# Variants of the 2018 paper that are not estimators of a node: (resample, fixed noise).
VARIANTS = {"gr": (True, False), "rp-fs": (False, True), "gr-fs": (True, True)}


def check_arguments(agent: PIPPS) -> None:
    """One sentence per wrong value, before any work is done."""
    known, variant = [*estimators.names(), *VARIANTS], ""
    if not isinstance(agent.estimator, estimators.Estimator):
        variant = str(agent.estimator)
        if agent.estimator not in known:
            raise ValueError(estimators.unknown_name(agent.estimator, known))
    if getattr(agent, "observation_space", None) is None:
        raise ValueError("PIPPS needs an environment to learn in: pass env=... (an id or instance)")
    checks: list[tuple[str, Any, bool, str]] = [
        ("leg", agent.leg, agent.leg in LEGS, f"one of {', '.join(LEGS)}"),
        _whole(agent, "n_particles", 6 if agent.cross_fit else 3),
        _whole(agent, "horizon", 1),
        _whole(agent, "gradient_steps", 1),
        _whole(agent, "random_trials", 1),
        _whole(agent, "gp_evaluations", 1),
        _whole(agent, "max_points", 0),
        ("cost_fn", agent.cost_fn, agent.cost_fn is None or callable(agent.cost_fn), "a function"),
        ("noise_multiplier", agent.noise_multiplier, agent.noise_multiplier > 0, "above 0"),
        ("adam_eps", agent.adam_eps, agent.adam_eps > 0, "above 0"),
        ("momentum", agent.momentum, 0 <= agent.momentum < 1, "in [0, 1)"),
    ]
    if not callable(agent.learning_rate):
        rate = agent.learning_rate
        checks.append(("learning_rate", rate, 0 < rate < math.inf, "above 0"))
    names = ("adam", "rmsprop2018", "quasi-newton")
    checks.append(("optimizer", agent.optimizer, agent.optimizer in names, f"one of {names}"))
    for name, value, is_good, expected in checks:
        if not is_good:
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    if agent.optimizer == "quasi-newton" and variant not in ("rp-fs", "gr-fs"):
        raise ValueError(
            "optimizer 'quasi-newton' needs a deterministic objective; "
            "choose estimator 'rp-fs' or 'gr-fs'"
        )
    if "angle_dims" in agent.policy_kwargs:
        raise ValueError(
            "angle_dims is for model and policy: pass it to PIPPS, not in policy_kwargs"
        )
    _check_spaces(agent)


def _whole(agent: PIPPS, name: str, least: int) -> tuple[str, Any, bool, str]:
    value = getattr(agent, name)
    is_good = isinstance(value, int) and value >= least
    return name, value, is_good, f"at least {least}, a whole number"


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
