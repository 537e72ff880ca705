"""Q-networks fitted to the λ-returns of one rollout (QAA). Nauman & Cygan 2022, Sec. 4.2."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.mlp_dynamics import ACTIVATIONS, Activation, network


class QNetworks(nn.Module):
    """The least of n networks (s, a) -> R; two, as in the 2023 revision, or one.

    Args:
        state_size: S. action_size: A. n: networks. width, layers, activation: of each.
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        n: int = 2,
        width: int = 512,
        layers: int = 2,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        sizes = [state_size + action_size] + [width] * layers + [1]
        self.networks = nn.ModuleList(network(sizes, ACTIVATIONS[activation]) for _ in range(n))

    def all(self, states: Tensor, actions: Tensor) -> Tensor:
        """[n, ...] of each network."""
        x = torch.cat((states, actions), -1)
        return torch.stack([q(x).squeeze(-1) for q in self.networks])

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """[...] the least."""
        return self.all(states, actions).amin(0)

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        states: Tensor,
        actions: Tensor,
        targets: Tensor,
        *,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
    ) -> float:
        """Gradient steps on batches of the rollout; the mean loss of the last tenth."""
        late: list[float] = []
        for step in range(steps):
            rows = torch.as_tensor(rng.permutation(len(states))[:batch_size])
            loss = (self.all(states[rows], actions[rows]) - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 0.9 * steps - 1:
                late.append(float(loss.detach()))
        return float(np.mean(late))
