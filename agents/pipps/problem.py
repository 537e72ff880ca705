"""What a PIPPS agent simulates: where particles start and what a step costs.

From the environment where it offers them, else from the data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import ObservationWrapper, RewardWrapper, Wrapper
from gymnasium.wrappers import NormalizeReward
from torch import Tensor

from totalprop.agents.persistence import env_state
from totalprop.agents.pipps.particles import Cost, ParticleModel
from totalprop.agents.trials.controllers import trig_features

if TYPE_CHECKING:
    from totalprop.agents.pipps.agent import PIPPS


def particle_model(agent: PIPPS) -> ParticleModel:
    """The model that policies are searched in."""
    mean, std = start_distribution(agent)
    return ParticleModel(
        dynamics=agent.dynamics,
        start_mean=torch.as_tensor(mean, dtype=torch.float64, device=agent.device),
        start_std=torch.as_tensor(std, dtype=torch.float64, device=agent.device),
        cost=cost(agent),
        model_uncertainty=agent.model_uncertainty,
        noise_multiplier=agent.noise_multiplier,
    )


def cost(agent: PIPPS) -> Cost:
    """The given cost, the environment's own, or a GP on the rewards seen so far."""
    if agent._needs_cost_fn and agent.cost_fn is None:
        raise ValueError(
            "this agent was made with a cost_fn, which is not in its file; "
            "pass it again: PIPPS.load(path, env=env, cost_fn=...)"
        )
    own = agent.cost_fn or own_cost(agent)
    if own is not None:
        return lambda states, actions: own(states)
    agent.reward_model.fit(max_evaluations=agent.gp_evaluations)

    def negative_reward(states: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat((trig_features(states, agent.angle_dims), actions), -1)
        mean = agent.reward_model.posterior(inputs.flatten(0, -2)).mean
        return -mean.reshape(states.shape[:-1])

    return negative_reward


def own_cost(agent: PIPPS) -> Callable[[Tensor], Tensor] | None:
    """The environment's `cost(states)`, unless it is not what PIPPS takes: then with a warning."""
    own = env_attribute(agent, "cost")
    if own is None:
        return None
    problem = cost_problem(own, agent.observation_space.shape[0], agent.device)  # type: ignore[index]
    if problem is not None:
        _warn_unused("cost", problem)
        return None
    return own


def cost_problem(cost: Any, states: int, device: torch.device) -> str | None:
    """Why a cost is not a differentiable function of the states alone, or None if it is."""
    x = torch.zeros(2, 3, states, dtype=torch.float64, device=device, requires_grad=True)
    try:
        found: Any = cost(x)
    except Exception as error:  # whatever a user's function may raise
        return (
            f"it takes states [..., {states}] and gives a cost each, but with states "
            f"[2, 3, {states}] it raised {type(error).__name__}: {error}"
        )
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, 3]:
        return (
            f"it must give one cost per state, of states [2, 3, {states}] a tensor [2, 3], "
            f"got {shape}"
        )
    if not found.requires_grad:
        return "it must be differentiable: a cost of torch operations on the states it is given"
    return None


def start_distribution(agent: PIPPS) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [S] of the particles' start: the environment's own, or from its resets."""
    given = own_start(agent)
    if given is not None:
        return given
    starts = np.stack(agent._start_observations).astype(np.float64)
    # One reset says nothing of the spread: assume that of one noisy observation at least.
    noise = agent.dynamics.noise.cpu().numpy() / math.sqrt(2)
    return starts.mean(0), np.maximum(starts.std(0), noise)


def own_start(agent: PIPPS) -> tuple[np.ndarray, np.ndarray] | None:
    """The environment's `initial_distribution`, a mean and std [S], or None."""
    given = env_attribute(agent, "initial_distribution")
    if given is None:
        return None
    try:
        mean, std = (np.asarray(part, np.float64) for part in given)
    except (TypeError, ValueError):
        mean = std = np.zeros(0)
    shape = agent.observation_space.shape
    if mean.shape != shape or std.shape != shape:
        _warn_unused("initial_distribution", f"it must be a mean and a std of shape {shape}")
        return None
    return mean, std


def place_policy(agent: PIPPS, model: ParticleModel) -> None:
    """Put the controller over the start state (unit scale), or over the first data."""
    if own_start(agent) is not None:
        mean = trig_features(model.start_mean, agent.angle_dims)
        std = torch.ones_like(mean)
    else:
        features = agent.dynamics.inputs[:, : agent.policy.n_features]
        mean, std = features.mean(0), features.std(0, correction=0)
        std = torch.where(std > 1e-6 * mean.abs().clamp_min(1.0), std, torch.ones_like(std))
    agent.policy.place(mean, std)


def env_attribute(agent: PIPPS, name: str) -> Any:
    """An attribute of the (first) environment, or None.

    It speaks of the environment's own observations and rewards: not used, with a warning, where an
    ObservationWrapper or RewardWrapper (or NormalizeReward, or a vector wrapper that is not known)
    changes them. A wrapper that does so in a `step` of its own is not noticed.
    """
    if agent.env is None or not agent.env.has_attr(name):
        return None
    changing: list[type[Wrapper[Any, Any, Any, Any]]] = [ObservationWrapper]
    if name == "cost":
        changing += [RewardWrapper, NormalizeReward]
    inner = agent.env.get_attr("unwrapped", indices=0)[0]
    if (
        any(type(layer) not in env_state.LAYERS for layer in env_state.layers_of(agent.env)[0])
        or inner.observation_space != agent.observation_space
        or any(agent.env.env_is_wrapped(wrapper, indices=0)[0] for wrapper in changing)
    ):
        _warn_unused(name, "a wrapper changes what it speaks of")
        return None
    return agent.env.get_attr(name, indices=0)[0]


def _warn_unused(name: str, why: str) -> None:
    warnings.warn(
        f"the environment's own `{name}` is not used, because {why}; it is learned from the data",
        stacklevel=3,
    )
