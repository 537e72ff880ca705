"""A deterministic model of vector dynamics: the next state and the reward of an action.

Two perceptrons, s' = s + F(s, a) (or F(s, a)) and r = R(s, a), fitted to stored transitions by mean
squared error. Nauman & Cygan 2022 (DAA), Sec. 4 and 5. Delta targets and standardised inputs follow
MBRL-Lib (Pineda et al. 2021).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.transitions import TransitionBuffer

Target = Literal["next", "delta"]
Activation = Literal["relu", "leaky_relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class MLPDynamics(nn.Module):
    """(s, a) -> (s', r), differentiable in both.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        width: hidden units per layer of both networks.
        layers: hidden layers of both networks.
        target: what the transition network predicts, the next state or the change of state.
        normalise: standardise states, targets and rewards by the data's statistics (`set_scale`).
        activation: "relu" or "leaky_relu".
    """

    state_mean: Tensor
    state_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        width: int,
        layers: int = 2,
        target: Target = "delta",
        normalise: bool = True,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.target, self.normalise = target, normalise
        for name, size in (("state", state_size), ("target", state_size), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        sizes = [state_size + action_size] + [width] * layers
        self.transition = network([*sizes, state_size], ACTIVATIONS[activation])
        self.reward = network([*sizes, 1], ACTIVATIONS[activation])

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Next states [..., S] and rewards [...], from [..., S] and [..., A]."""
        x = torch.cat(((states - self.state_mean) / self.state_std, actions), -1)
        change = self.transition(x) * self.target_std + self.target_mean
        reward = self.reward(x) * self.reward_std + self.reward_mean
        return (states + change if self.target == "delta" else change), reward.squeeze(-1)

    def losses(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared errors of transition and reward, standardised by the data's deviations.

        Args:
            states: [..., S].
            actions: [..., A].
            rewards: [...].
            next_states: [..., S].
        """
        predicted, reward = self(states, actions)
        transition = ((predicted - next_states) / self.target_std).square().mean()
        return transition, ((reward - rewards) / self.reward_std).square().mean()

    @torch.no_grad()
    def set_scale(self, buffer: TransitionBuffer) -> None:
        """Set means and standard deviations to the data's; no effect with normalise=False."""
        if not self.normalise:
            return
        n = len(buffer)
        targets = buffer.next_states[:n]
        if self.target == "delta":
            targets = targets - buffer.states[:n]
        data = {"state": buffer.states[:n], "target": targets, "reward": buffer.rewards[:n, None]}
        for name, values in data.items():
            mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
            std = np.where(std > 1e-6 * np.abs(mean) + 1e-8, std, 1.0)  # constant entries
            getattr(self, f"{name}_mean").copy_(torch.as_tensor(mean))
            getattr(self, f"{name}_std").copy_(torch.as_tensor(std))


def fit(
    model: MLPDynamics,
    optimizer: torch.optim.Optimizer,
    buffer: TransitionBuffer,
    *,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Minimise the sum of both losses on batches drawn uniformly from the buffer.

    Args:
        model: what is fitted; its scales are set to the data's first.
        optimizer: of the model's parameters.
        buffer: holds at least one transition.
        steps: gradient steps.
        batch_size: transitions per step.
        rng: draws the batches.

    Returns:
        The mean transition loss and the mean reward loss over the last tenth of the steps.
    """
    model.set_scale(buffer)
    device = next(model.parameters()).device
    late: list[tuple[float, float]] = []
    for step in range(steps):
        batch = (torch.as_tensor(x, device=device) for x in buffer.sample(batch_size, rng))
        transition, reward = model.losses(*batch)
        optimizer.zero_grad()
        (transition + reward).backward()
        optimizer.step()
        if step >= 0.9 * steps - 1:
            late.append((float(transition.detach()), float(reward.detach())))
    means = np.mean(late, axis=0)
    return float(means[0]), float(means[1])


def network(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """A perceptron with orthogonal weights of gain 1 and zero biases, as in the authors' code."""
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        parts += [linear, activation()]
    return nn.Sequential(*parts[:-1])
