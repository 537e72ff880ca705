"""Checks of PIPPS's constructor arguments: one sentence per wrong value, before any work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gymnasium import spaces

import estimators

if TYPE_CHECKING:
    from agents.pipps import PIPPS

LEGS = {"score": estimators.legs.score, "biw": estimators.legs.biw}
# Variants of the 2018 paper that are not estimators of a node: (resample, fixed noise).
VARIANTS = {"gr": (True, False), "rp-fs": (False, True), "gr-fs": (True, True)}


def check_arguments(agent: PIPPS) -> None:
    """One sentence per wrong value, before any work is done."""
    variant = agent.estimator if isinstance(agent.estimator, str) else ""
    if variant not in VARIANTS:
        estimators.make(agent.estimator)
    checks: list[tuple[str, Any, bool, str]] = [
        ("leg", agent.leg, agent.leg in LEGS, f"one of {', '.join(LEGS)}"),
        ("n_particles", agent.n_particles, agent.n_particles >= 3, "at least 3"),
        ("horizon", agent.horizon, agent.horizon >= 1, "at least 1 step"),
        ("gradient_steps", agent.gradient_steps, agent.gradient_steps >= 1, "at least 1"),
        ("random_trials", agent.random_trials, agent.random_trials >= 1, "at least 1 episode"),
        ("noise_multiplier", agent.noise_multiplier, agent.noise_multiplier > 0, "above 0"),
        ("adam_eps", agent.adam_eps, agent.adam_eps > 0, "above 0"),
        ("momentum", agent.momentum, 0 <= agent.momentum < 1, "in [0, 1)"),
        ("gp_evaluations", agent.gp_evaluations, agent.gp_evaluations >= 1, "at least 1"),
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
    _check_spaces(agent)


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
        raise ValueError(
            "PIPPS fits its model to raw observations, whose scale VecNormalize keeps changing; "
            "pass the environment without VecNormalize (the GP scales its inputs itself)"
        )
    wrong = [d for d in agent.angle_dims if not 0 <= d < space.shape[0]]
    if wrong:
        raise ValueError(
            f"angle_dims must be entries of the observation, 0..{space.shape[0] - 1}, got {wrong}"
        )
