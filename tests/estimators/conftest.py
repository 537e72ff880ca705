"""A linear-Gaussian chain whose expected cost is known in closed form, used by these tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from totalprop.estimators import Estimator, ParameterProbe, assign_credit
from totalprop.estimators.probes import Gram

F64 = torch.float64
STATE_TO_X = torch.tensor([[0.9, 0.2, 0.1, 0.0], [-0.3, 0.8, 0.0, 0.2]], dtype=F64)
ACTION_TO_X = torch.tensor([[1.0, 0.3], [0.0, 0.5]], dtype=F64)
H_TO_H = torch.tensor([[0.5, 0.1], [0.0, 0.6]], dtype=F64)
X_TO_H = torch.tensor([[0.4, 0.0], [0.2, -0.3]], dtype=F64)
TARGET = torch.tensor([0.5, -0.4, 0.2, 0.1], dtype=F64)
START_MEAN = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=F64)
START_STD = torch.tensor([0.3, 0.2, 0.1, 0.1], dtype=F64)


def gram_by_hand(b: Tensor) -> Gram:
    """The `Gram` of per-sample gradients [M, N, P]."""
    mean = b.mean(1)
    centred = b - mean.unsqueeze(1)
    covariance = torch.einsum("anp,bnp->ab", centred, centred)
    return Gram(covariance, b.shape[1] * mean @ mean.T, b.sum(1))


@dataclass(frozen=True)
class LinearGaussian:
    """x' ~ N(A x + C h + B u, std); h' = E h + F x', which bypasses the node; u = K [x, h] + b.

    The cost of a step is |s - target|² / 2 + action_cost·|u|² / 2 with s = [x, h], summed over the
    horizon. Parameters: gain K [2, 4], bias b [2], log_std [2]; P = 12.
    """

    horizon: int = 4
    action_cost: float = 0.2

    def parameters(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        gain = 0.3 * torch.randn(2, 4, dtype=F64, generator=generator)
        bias = 0.3 * torch.randn(2, dtype=F64, generator=generator)
        log_std = torch.tensor([-0.5, -0.9], dtype=F64)
        named = {"gain": gain, "bias": bias, "log_std": log_std}
        return {name: p.requires_grad_() for name, p in named.items()}

    def noise(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise of the start [N, 4] and of the nodes [H, N, 2]."""
        start = torch.randn(n, 4, dtype=F64, generator=generator)
        return start, torch.randn(self.horizon, n, 2, dtype=F64, generator=generator)

    def zeta(self, parameters: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of x', each [..., 2], at a state [..., 4]."""
        action = state @ parameters["gain"].T + parameters["bias"]
        mean = state @ STATE_TO_X.T + action @ ACTION_TO_X.T
        return mean, parameters["log_std"].exp().expand_as(mean)

    def loss(
        self,
        estimator: Estimator,
        tap: Tensor | None,
        parameters: dict[str, Tensor],
        noise: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Mean cost of a rollout with the estimator's nodes, with a probe if it needs one."""
        state = START_MEAN + START_STD * noise[0]
        credit = state.new_zeros(len(state))
        loss = state.new_zeros(())
        probed = dict(parameters)
        if estimator.probe == "subset":
            probed = {"gain": parameters["gain"]}

        def function(p: dict[str, Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
            return self.zeta({**parameters, **p}, s)

        for noise_t in noise[1]:
            probe = None
            if tap is not None or estimator.probe != "none":
                probe = ParameterProbe(function, probed, state)
            action = state @ parameters["gain"].T + parameters["bias"]
            action_cost = 0.5 * self.action_cost * action.square().sum(-1)
            loss = loss + assign_credit(action_cost, credit).mean()
            mean, std = self.zeta(parameters, state)
            x, credit = estimator(mean, std, noise_t, credit, probe=probe, tap=tap)
            state = torch.cat((x, state[:, 2:] @ H_TO_H.T + x @ X_TO_H.T), -1)
            cost = 0.5 * (state - TARGET).square().sum(-1)
            loss = loss + assign_credit(cost, credit).mean()
        return loss

    def expected_loss(self, parameters: dict[str, Tensor]) -> Tensor:
        """E[loss] in closed form, by propagating mean and covariance of s = [x, h]."""
        gain, bias, std = parameters["gain"], parameters["bias"], parameters["log_std"].exp()
        mean, covariance = START_MEAN, torch.diag(START_STD.square())
        to_x = STATE_TO_X + ACTION_TO_X @ gain
        to_h = torch.cat((torch.zeros(2, 2, dtype=F64), H_TO_H), 1)
        transition = torch.cat((to_x, to_h + X_TO_H @ to_x))
        noise_to_state = torch.cat((torch.eye(2, dtype=F64), X_TO_H)) * std
        offset = torch.cat((ACTION_TO_X @ bias, X_TO_H @ (ACTION_TO_X @ bias)))
        loss = torch.zeros((), dtype=F64)
        for _ in range(self.horizon):
            action_mean, action_covariance = gain @ mean + bias, gain @ covariance @ gain.T
            action_square = action_mean.square().sum() + action_covariance.trace()
            loss = loss + 0.5 * self.action_cost * action_square
            mean = transition @ mean + offset
            covariance = transition @ covariance @ transition.T + noise_to_state @ noise_to_state.T
            loss = loss + 0.5 * ((mean - TARGET).square().sum() + covariance.trace())
        return loss

    def without_direct_paths(self) -> LinearGaussian:
        """A chain whose parameters act through the nodes only, as the `tap` requires."""
        return replace(self, action_cost=0.0)


@pytest.fixture
def chain() -> LinearGaussian:
    return LinearGaussian()
