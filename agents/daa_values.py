"""What says how good DAAPPO's extra actions are: a learned model, Q-networks or the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces

from agents.extra_actions import (
    Behaviour,
    DynamicsSource,
    QSource,
    RewindSource,
    Rollout,
    Source,
    StatesSource,
)
from world_models.mlp import MLPDynamics
from world_models.mlp import fit as fit_dynamics
from world_models.q_network import QNetworks

if TYPE_CHECKING:
    from agents.daa_ppo import DAAPPO

ValueModel = MLPDynamics | QNetworks


def new_value_model(agent: DAAPPO) -> ValueModel | None:
    """What `action_source` learns, untrained; None for one that learns nothing."""
    n_states = spaces.utils.flatdim(agent.observation_space)
    n_actions = spaces.utils.flatdim(agent.action_space)
    sizes: dict[str, Any] = {
        "width": agent.dynamics_width, "activation": agent.dynamics_activation
    }  # fmt: skip
    if agent.action_source in ("dynamics", "states"):
        return MLPDynamics(
            n_states, n_actions, target=agent.dynamics_target,
            normalise=agent.dynamics_normalise, **sizes,
        ).to(agent.device)  # fmt: skip
    if agent.action_source == "q":
        return QNetworks(n_states, n_actions, n=agent.n_q, **sizes).to(agent.device)
    return None


def new_source(agent: DAAPPO) -> Source | None:
    """Where the extra actions come from; None if that is an environment not set yet."""
    if isinstance(agent.value_model, QNetworks):
        return QSource(agent.value_model)
    if isinstance(agent.value_model, MLPDynamics):
        is_states = agent.action_source == "states"
        return (StatesSource if is_states else DynamicsSource)(agent.value_model)
    if agent.env is None:  # `load` without an environment: made when one is set
        return None
    return RewindSource(agent.env, timeout_bootstrap=agent.timeout_bootstrap)


def fit(
    agent: DAAPPO,
    rollout: Rollout,
    behaviour: Behaviour,
    actions: torch.Tensor,
    returns: torch.Tensor,
) -> None:
    """Fit what is learned, if anything: a model to all transitions, Q to this rollout's returns.

    Args:
        actions: [R, A] of the rollout, as the policy drew them. returns: [R].
    Raises:
        ValueError: there is no transition to fit a model to.
    """
    if agent.value_model is None:
        return
    assert agent.value_optimizer is not None
    batches = -(-len(rollout.states) // agent.batch_size)
    steps = agent.dynamics_steps or agent.n_epochs * batches
    if isinstance(agent.value_model, QNetworks):
        loss = agent.value_model.fit(
            agent.value_optimizer, rollout.observations, behaviour.clip(actions), returns,
            steps=steps, batch_size=agent.batch_size, rng=agent._rng,
        )  # fmt: skip
        agent.logger.record("dynamics/q_loss", loss)
    else:
        if not len(agent.transitions):
            raise ValueError(
                "no transition is known: every step is an episode's last, and VecNormalize clips "
                "its state; give VecNormalize a larger clip_obs"
            )
        transition, reward = fit_dynamics(
            agent.value_model, agent.value_optimizer, agent.transitions,
            steps=steps, batch_size=agent.dynamics_batch_size, rng=agent._rng,
        )  # fmt: skip
        agent.logger.record("dynamics/transition_loss", transition)
        agent.logger.record("dynamics/reward_loss", reward)
