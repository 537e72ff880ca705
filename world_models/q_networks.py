"""Q-networks fitted to the λ-returns or λ-advantages of a rollout (QAA).

Nauman & Cygan 2022, Sec. 5 (one network, advantages). Their revision of 2023 takes the smaller of
two values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.mlp_dynamics import ACTIVATIONS, Activation, network


class QNetworks(nn.Module):
    """The smallest value of n networks (s, a) -> Q.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        n: number of networks.
        width: hidden units per layer.
        layers: hidden layers.
        activation: "relu" or "leaky_relu".
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
        """Values [n, ...] of all networks at states [..., S] and actions [..., A]."""
        x = torch.cat((states, actions), -1)
        return torch.stack([q(x).squeeze(-1) for q in self.networks])

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """The smallest of the networks' values, [...]."""
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
        """Minimise the mean squared error of all networks on batches of a rollout.

        Args:
            optimizer: of this module's parameters.
            states: [R, S].
            actions: [R, A].
            targets: [R].
            steps: gradient steps.
            batch_size: rows per step.
            rng: draws the rows.

        Returns:
            The mean loss over the last tenth of the steps.
        """
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
