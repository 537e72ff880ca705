"""What SVG learns besides the policy: the critic with its target copy, and the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.mlp_dynamics import network
from totalprop.world_models.stochastic_dynamics import (
    ACTIVATIONS,
    Reward,
    RunningMoments,
    StochasticDynamics,
)

LONGEST = 100.0  # steps; the unit of values grows with 1 / (1 - γ) up to this


class Critic(nn.Module):
    """V(s), or Q(s, a) with action_size > 0, at standardised states, and a copy for targets.

    Values are in units of the rewards' deviation over the horizon 1 / (1 - γ), so that the outputs
    of the networks are of order 1. The paper does not mention units.

    Args:
        state_size: S, the length of a state.
        action_size: A for Q, 0 for V.
        hidden: hidden units per layer.
        activation: "tanh", "relu" or "elu".
    """

    unit: Tensor

    def __init__(
        self, state_size: int, action_size: int, *, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        sizes = [state_size + action_size, *hidden, 1]
        self.network = network(sizes, ACTIVATIONS[activation])
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.rewards = RunningMoments(1)
        self.register_buffer("unit", torch.ones(1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Values [...], from states [..., S] and, for Q, actions [..., A]."""
        value: Tensor = self.network(torch.cat(inputs, -1)) * self.unit
        return value.squeeze(-1)

    @torch.no_grad()
    def of_target(self, *inputs: Tensor) -> Tensor:
        """The same by the copy, without gradient."""
        value: Tensor = self.target(torch.cat(inputs, -1)) * self.unit
        return value.squeeze(-1)

    def copy_to_target(self) -> None:
        """ν = ν_new. Heess et al. 2015, Alg. 4."""
        self.target.load_state_dict(self.network.state_dict())

    def loss(self, targets: Tensor, weights: Tensor, *inputs: Tensor) -> Tensor:
        """Mean of w / 2 (y - V)² in the critic's units. Heess et al. 2015, Alg. 4.

        Args:
            targets: y [N].
            weights: w [N].
            inputs: states [N, S] and, for Q, actions [N, A].
        """
        errors = (targets - self(*inputs)) / self.unit
        return (weights * errors.square()).mean() / 2

    @torch.no_grad()
    def see(self, rewards: np.ndarray, gamma: float) -> None:
        """Take the unit from more rewards [n]."""
        self.rewards.update(rewards[:, None])
        self.unit.copy_(self.rewards.std * min(1 / max(1 - gamma, 1e-9), LONGEST))


class WorldModel(nn.Module):
    """Dynamics and reward.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        hidden: hidden units per layer of each dimension's sub-network.
        reward_hidden: hidden units per layer of the reward's.
        activation: "tanh", "relu" or "elu".
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        hidden: Sequence[int],
        reward_hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        self.dynamics = StochasticDynamics(
            state_size, action_size, hidden=hidden, activation=activation
        )
        self.reward = Reward(state_size, action_size, hidden=reward_hidden, activation=activation)
