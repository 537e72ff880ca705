"""A stochastic model of vector dynamics, with a perceptron of its own for each state dimension.

s'_i ~ N(s_i + f_i(s, a), σ_i²), with σ constant, fitted by maximum likelihood. Heess et al. 2015
(SVG), App. C: parallel sub-networks, because the state's dimensions vary on different scales. A
perceptron for the reward r(s, a) is beside it.

All states are standardised by `StateScale`. Differs from the paper, which does not mention scales:
the sub-networks predict the change of the state in units of the changes' standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.mlp_dynamics import network

MIN_STD = 1e-3  # of σ, in units of the changes' standard deviation
FIRST_STD = 1.0  # the same unit: at first the model knows no more than the data's spread
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}


class RunningMoments(nn.Module):
    """Mean and standard deviation of all values seen so far, in double precision.

    Args:
        size: D, the length of a value.

    Attributes:
        mean: [D].
        squares: [D] sum of the squared deviations from the mean.
        largest: [D] the largest magnitude.
        count: [1] number of values.
    """

    mean: Tensor
    squares: Tensor
    largest: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("mean", "squares", "largest"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: np.ndarray) -> None:
        """See n more values [n, D]. Chan et al. 1983."""
        new = torch.as_tensor(values, device=self.mean.device).double()
        n = len(new)
        if n == 0:
            return
        mean, total = new.mean(0), self.count + n
        difference = mean - self.mean
        squares = (new - mean).square().sum(0)
        self.squares += squares + difference.square() * self.count * n / total
        self.mean += difference * n / total
        self.largest.copy_(torch.maximum(self.largest, new.abs().amax(0)))
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """[D] float64; 1 for what is constant."""
        return torch.where(self.is_constant, 1.0, self._spread)

    @property
    def is_constant(self) -> Tensor:
        """[D] bool; rounding makes no spread."""
        return ~(self._spread > 1e-6 * self.largest)

    @property
    def _spread(self) -> Tensor:
        return (self.squares / self.count.clamp(min=1)).sqrt()


class StateScale(RunningMoments):
    """Standardise states by those seen so far, in single precision.

    Args:
        state_size: S, the length of a state.

    Attributes:
        offset: [S] float64, the first state. What varies little around a large number keeps its
            digits. The moments are those of the differences from it.
    """

    offset: Tensor

    def __init__(self, state_size: int) -> None:
        super().__init__(state_size)
        self.register_buffer("offset", torch.zeros(state_size, dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        """Standardised states [..., S] in float32, from states in the environment's units.

        They are 0 before the first update: without a scale, any number would be one of the units.
        """
        scaled = (states.double() - self.offset - self.mean) / self.std
        return torch.where(self.count > 0, scaled, 0.0).float()

    def inverse(self, states: Tensor) -> Tensor:
        """States [..., S] in the environment's units, float64, from standardised ones."""
        return states * self.std + self.mean + self.offset

    @torch.no_grad()
    def update(self, values: np.ndarray) -> None:
        """See n more states [n, S] in the environment's units."""
        if self.count == 0 and len(values):
            self.offset.copy_(torch.as_tensor(values[0]))
        super().update(values - self.offset.cpu().numpy())


class StochasticDynamics(nn.Module):
    """(s, a) -> mean and standard deviation of s', all standardised; differentiable in both.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        hidden: hidden units per layer of each of the S sub-networks.
        activation: "tanh", "relu" or "elu".
    """

    change_mean: Tensor
    change_std: Tensor

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (20, 20),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.changes = RunningMoments(state_size)
        self.register_buffer("change_mean", torch.zeros(state_size))
        self.register_buffer("change_std", torch.ones(state_size))
        sizes = [state_size + action_size, *hidden, 1]
        self.layers = nn.ModuleList(ParallelLinear(state_size, a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()
        self.log_std = nn.Parameter(torch.full((state_size,), math.log(FIRST_STD)))

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., S], from states [..., S] and actions [..., A]."""
        change, std = self._change(states, actions)
        return states + self.change_mean + self.change_std * change, self.change_std * std

    def _change(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., S] of the standardised change."""
        x = torch.cat((states, actions), -1).unsqueeze(-2)  # [..., 1, S + A], for all sub-networks
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))  # [..., S, hidden]
        change: Tensor = self.layers[-1](x).squeeze(-1)  # [..., S]
        return change, (MIN_STD + self.log_std.exp()).expand_as(change)

    def loss(self, states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
        """Negative log-likelihood [] of the standardised changes, averaged over all entries.

        Args:
            states: [N, S].
            actions: [N, A].
            next_states: [N, S].
        """
        mean, std = self._change(states, actions)
        target = (next_states - states - self.change_mean) / self.change_std
        return (0.5 * ((target - mean) / std).square() + std.log()).mean()

    @torch.no_grad()
    def see(self, changes: np.ndarray, scale: StateScale) -> None:
        """Take the moments of more changes of the state.

        Args:
            changes: [n, S] in the environment's units.
            scale: of the states, as it is now.
        """
        self.changes.update(changes)
        self.change_mean.copy_(self.changes.mean / scale.std)
        std = self.changes.std / scale.std
        # What never changes in another way has no scale of its own.
        self.change_std.copy_(torch.where(self.changes.is_constant, 1.0, std))


class ParallelLinear(nn.Module):
    """n linear layers side by side: [..., n, a] or, one input for all, [..., 1, a] -> [..., n, b].

    Args:
        n: number of layers.
        a: inputs of each.
        b: outputs of each.
    """

    def __init__(self, n: int, a: int, b: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_orthogonal(n, b, a))
        self.bias = nn.Parameter(torch.zeros(n, b))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] == 1:  # one product for all layers
            n, b, _ = self.weight.shape
            return (x @ self.weight.flatten(0, 1).T).unflatten(-1, (n, b)).squeeze(-3) + self.bias
        return torch.einsum("...na,nba->...nb", x, self.weight) + self.bias


def _orthogonal(n: int, b: int, a: int) -> Tensor:
    """n random matrices [n, b, a], each with orthonormal rows or columns. Saxe et al. 2014."""
    q, r = torch.linalg.qr(torch.randn(n, max(a, b), min(a, b)))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # or they would not be uniform
    return (q if b >= a else q.mT).contiguous()


class Reward(nn.Module):
    """(s, a) -> r in the environment's units, from standardised states.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        hidden: hidden units per layer.
        activation: "tanh", "relu" or "elu".
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.rewards = RunningMoments(1)
        self.network = network([state_size + action_size, *hidden, 1], ACTIVATIONS[activation])

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Rewards [...], from states [..., S] and actions [..., A]."""
        found = self.network(torch.cat((states, actions), -1))
        scaled: Tensor = found * self.rewards.std.float() + self.rewards.mean.float()
        return scaled.squeeze(-1)

    def loss(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        """Mean squared error [], standardised by the rewards' variance.

        Args:
            states: [N, S].
            actions: [N, A].
            rewards: [N].
        """
        errors = (self(states, actions) - rewards) / self.rewards.std.float()
        return errors.square().mean()

    def see(self, rewards: np.ndarray) -> None:
        """Take the moments of more rewards [n]."""
        self.rewards.update(rewards[:, None])
