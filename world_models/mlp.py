"""A deterministic model of vector dynamics: what follows a state and an action, and its reward.

Two perceptrons, s' = s + F(s, a) (or F(s, a)) and r = R(s, a), fitted to stored transitions by mean
squared error. Nauman & Cygan 2022 (DAA), Sec. 4; delta targets and normalised inputs are those of
MBRL-Lib (Pineda et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Target = Literal["next", "delta"]
Activation = Literal["relu", "leaky_relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class TransitionBuffer:
    """First in, first out: transitions of vectors in their environment's own units.

    Args:
        capacity: transitions held. state_size: S. action_size: A.
    """

    _ARRAYS = ("states", "actions", "rewards", "next_states")

    def __init__(self, capacity: int, state_size: int, action_size: int) -> None:
        self.capacity = capacity
        self.states = np.empty((capacity, state_size), np.float32)
        self.actions = np.empty((capacity, action_size), np.float32)
        self.rewards = np.empty(capacity, np.float32)
        self.next_states = np.empty((capacity, state_size), np.float32)
        self.count = 0  # ever added

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def add(
        self, states: np.ndarray, actions: np.ndarray, rewards: np.ndarray, next_states: np.ndarray
    ) -> None:
        """Store n transitions: [n, S], [n, A], [n], [n, S] (the true next states of an end)."""
        slots = (self.count + np.arange(len(states))) % self.capacity
        self.states[slots], self.actions[slots] = states, actions
        self.rewards[slots], self.next_states[slots] = rewards, next_states
        self.count += len(states)

    def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Stored transitions, numbered from the first ever added."""
        slots = np.arange(first, stop) % self.capacity
        return {name: getattr(self, name)[slots] for name in self._ARRAYS}

    def put_rows(self, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Store what `rows` returned; calls go from old to new."""
        n = len(rows["rewards"])
        slots = np.arange(first, first + n) % self.capacity
        for name in self._ARRAYS:
            getattr(self, name)[slots] = rows[name]
        self.count = first + n

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """n different transitions (all there are, if fewer), drawn uniformly."""
        rows = rng.choice(len(self), min(n, len(self)), replace=False, shuffle=False)
        return self.states[rows], self.actions[rows], self.rewards[rows], self.next_states[rows]


class MLPDynamics(nn.Module):
    """(s, a) -> (s', r), differentiable in both.

    Args:
        state_size: S. action_size: A. width: of both networks' hidden layers; layers: how many.
        target: what the transition network predicts, the next state or the change.
        normalise: fit in units of the data's mean and standard deviation (`set_scale`).
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
        width: int = 512,
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
        """Mean squared errors of transition and reward, in the units that are fitted in."""
        predicted, reward = self(states, actions)
        transition = ((predicted - next_states) / self.target_std).square().mean()
        return transition, ((reward - rewards) / self.reward_std).square().mean()

    @torch.no_grad()
    def set_scale(self, buffer: TransitionBuffer) -> None:
        """Take means and deviations from the data; does nothing with normalise=False."""
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
    """Gradient steps on uniform batches; mean transition and reward loss of the last tenth."""
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
    """Orthogonal weights of gain 1, biases 0 (the authors' code)."""
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        parts += [linear, activation()]
    return nn.Sequential(*parts[:-1])
