"""Checks of DAAPPO's constructor arguments: one sentence per wrong value, before any work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from totalprop import estimators
from totalprop.agents.core.validation import (
    check_common,
    is_above,
    is_whole,
    is_within,
    try_estimator,
)
from totalprop.agents.persistence import env_state
from totalprop.estimators import Estimator

if TYPE_CHECKING:
    from totalprop.agents.daappo.agent import DAAPPO

SOURCES = ("none", "dynamics", "q", "rewind", "states")
DIFFERENTIABLE = ("dynamics", "q")  # whose advantage has a gradient in the action
WHOLE = {  # name: least value
    "n_epochs": 1, "n_extra_actions": 1, "simulation_horizon": 1, "dynamics_width": 1,
    "dynamics_batch_size": 1, "dynamics_steps": 0, "dynamics_buffer_size": 1, "dynamics_warmup": 0,
    "n_q": 1,
}  # fmt: skip
CHOICES = {
    "action_source": SOURCES,
    "extra_baseline": ("critic", "leave-one-out"),
    "real_advantage": ("gae", "matched_horizon"),
    "dynamics_target": ("next", "delta"),
    "dynamics_activation": ("relu", "leaky_relu"),
}


def check_arguments(agent: DAAPPO) -> None:
    """One sentence per wrong value, before any work is done."""
    check_common(agent)
    for name, choices in CHOICES.items():
        if getattr(agent, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_of(agent, name)}")
    for name, least in WHOLE.items():
        value = getattr(agent, name)
        if not is_whole(value, least):
            raise ValueError(f"{name} must be at least {least}, a whole number, got {value!r}")
    for name in ("dynamics_learning_rate", "dynamics_eps"):
        if not is_above(getattr(agent, name), 0):
            raise ValueError(f"{name} must be above 0, got {_of(agent, name)}")
    for name in ("grow_fraction", "gamma", "gae_lambda"):
        if not is_within(getattr(agent, name), 0, 1):
            raise ValueError(f"{name} must be in [0, 1], got {_of(agent, name)}")
    for name in ("learning_rate", "clip_range", "clip_range_vf", "max_grad_norm"):
        value = getattr(agent, name)
        if value is not None and not callable(value) and not is_above(value, 0):
            raise ValueError(f"{name} must be above 0, got {value!r}")
    if not is_within(agent.ent_coef, -math.inf):
        raise ValueError(f"ent_coef must be a finite number, got {agent.ent_coef!r}")
    if not is_within(agent.vf_coef, 0):
        raise ValueError(f"vf_coef must be at least 0, got {agent.vf_coef!r}")
    _check_estimator(agent)
    if compares_actions(agent) and agent.n_extra_actions < 2:
        raise ValueError(
            "extra_baseline 'leave-one-out' compares the actions of a state: n_extra_actions must "
            f"be at least 2, got {agent.n_extra_actions}"
        )
    _try_estimator(agent)
    if agent.action_source != "none" or agent.separate_grad_clip:
        _check_spaces(agent)
    if agent.action_source != "none" and agent.env is not None:
        _check_wrappers(agent, agent.env)
    if agent.action_source == "rewind" and agent.env is not None:
        _check_rewindable(agent.env)


def resolve(agent: DAAPPO) -> Estimator:
    """The estimator; a name's has no baseline, which the advantages have already."""
    if isinstance(agent.estimator, Estimator):
        return agent.estimator
    return estimators.make(agent.estimator, baseline=estimators.baselines.none)


def compares_actions(agent: DAAPPO) -> bool:
    """Whether extra actions are set against the others of their state."""
    has_several = agent.action_source in ("dynamics", "q", "rewind")
    return agent.extra_baseline == "leave-one-out" and has_several


def least_actions(agent: DAAPPO) -> int:
    """Extra actions that are needed: two, if legs are weighed or actions compared."""
    if compares_actions(agent):
        return 2
    weights = estimators.mixing
    is_one_leg = estimators.make(agent.estimator).weight in (
        weights.pathwise, weights.likelihood_ratio
    )  # fmt: skip
    return 1 if is_one_leg else 2


def _check_estimator(agent: DAAPPO) -> None:
    estimator = estimators.make(agent.estimator)
    if estimator.weight is estimators.mixing.likelihood_ratio:
        return
    if agent.action_source not in DIFFERENTIABLE:
        raise ValueError(
            f"estimator {agent.estimator!r} needs the advantage's gradient in the action, which "
            f"action_source={agent.action_source!r} has not; use estimator='lr', or "
            f"action_source in {', '.join(DIFFERENTIABLE)}"
        )
    if estimator.probe != "none" or estimator.whole_graph:
        raise ValueError(
            f"estimator {agent.estimator!r} weighs in parameter space, over the samples of one "
            "rollout; with many actions per state use 'lr', 'rp', 'tpx' or an ablation of 'tpx'"
        )
    if agent.n_extra_actions < least_actions(agent):
        raise ValueError(
            f"estimator {agent.estimator!r} compares the actions of a state: n_extra_actions must "
            f"be at least 2, got {agent.n_extra_actions}"
        )


def _try_estimator(agent: DAAPPO) -> None:
    """With as many actions as a state has when they are fewest."""
    if agent.action_source == "none":
        return
    k = agent.n_extra_actions
    if agent.grow_fraction > 0:
        k = min(k, least_actions(agent))
    try:
        try_estimator(resolve(agent), [k, 1])
    except ValueError as error:
        raise ValueError(
            f"estimator {agent.estimator!r} does not work with {k} extra action(s) per state "
            f"({error}); use a name of the registry, or raise n_extra_actions"
        ) from error


def _check_spaces(agent: DAAPPO) -> None:
    for name in ("observation_space", "action_space"):
        space = getattr(agent, name)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"extra actions and separate_grad_clip need a vector {name} (Box), got {space}; "
                "use action_source='none' and separate_grad_clip=False"
            )
    if agent.use_sde:
        raise ValueError("extra actions need a plain Gaussian policy: use_sde must be False")


def _check_wrappers(agent: DAAPPO, env: VecEnv) -> None:
    """Extra actions see what VecNormalize does, and for `rewind` no other wrapper does anything."""
    layers, _ = env_state.layers_of(env)
    if agent.action_source != "rewind":
        normalizer = agent.get_vec_normalize_env()
        layers = [] if normalizer is None else layers[: layers.index(normalizer)]
    for layer in layers:
        if type(layer) not in env_state.LAYERS:
            known = ", ".join(kind.__name__ for kind in env_state.LAYERS)
            raise ValueError(
                f"extra actions do not know what {type(layer).__name__} does to observations and "
                f"rewards: only {known} may be around VecNormalize, or around environments to "
                "rewind; wrap the single environments, or use action_source='none'"
            )


def _check_rewindable(env: VecEnv) -> None:
    if not all(env.has_attr(name) for name in ("snapshot", "restore", "extra_step")):
        raise ValueError(
            "action_source='rewind' needs an environment with snapshot, restore and extra_step; "
            "wrap it: envs.rewind.Rewindable(env), or use action_source='dynamics'"
        )


def _of(agent: DAAPPO, name: str) -> str:
    return repr(getattr(agent, name))
