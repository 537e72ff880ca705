"""A scalar linear-quadratic problem whose policy gradient is known in closed form.

s' = A s + B a + ξ σ_x, a = θ s + σ η, r = -(c s² + d a²), discount γ, start s_0. With F = A + B θ:
V(s) = -(p s² + k), p = (c + d θ²) / (1 - γ F²), k = (d σ² + γ p (B² σ² + σ_x²)) / (1 - γ).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from totalprop.agents.svg.gradients import Paths, Transitions

F64 = torch.float64
C, D, A, B = 1.0, 0.1, 0.9, 0.5
THETA, SIGMA, SIGMA_X = -0.6, 0.3, 0.2
GAMMA, START = 0.95, 1.3
F = A + B * THETA
P = (C + D * THETA**2) / (1 - GAMMA * F**2)
K = (D * SIGMA**2 + GAMMA * P * (B**2 * SIGMA**2 + SIGMA_X**2)) / (1 - GAMMA)
VALUE = -(P * START**2 + K)
# Σ_t γ^t E s_t² and Σ_t γ^t E s_t.
SQUARES = START**2 + GAMMA / (1 - GAMMA) * (B**2 * SIGMA**2 + SIGMA_X**2)
SQUARES /= 1 - GAMMA * F**2
SUM = START / (1 - GAMMA * F)
GRADIENT = (
    -2 * (D * THETA + GAMMA * P * B * F) * SQUARES,  # dV/dθ
    -2 * SIGMA * (D + GAMMA * P * B**2) / (1 - GAMMA),  # dV/dσ
)


def gradient_at(state: float) -> tuple[float, float]:
    """Gradient of E Q(s, a) through this action alone, at one state."""
    slope = -2 * (D * THETA + GAMMA * P * B * F)
    return slope * state**2, -2 * SIGMA * (D + GAMMA * P * B**2)


def parameters(n: int) -> dict[str, Tensor]:
    """θ and σ for each of n episodes, so that each has a gradient of its own."""
    values = {"theta": THETA, "sigma": SIGMA}
    return {k: torch.full((n,), v, dtype=F64, requires_grad=True) for k, v in values.items()}


def policy(parameters: Mapping[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [..., T·n, 1] at states of n episodes, time first; also of one state [1]."""
    theta, sigma = parameters["theta"], parameters["sigma"]
    if states.ndim > 1:
        repeats = states.shape[-2] // len(theta)
        theta, sigma = (x.repeat(repeats).unsqueeze(-1) for x in (theta, sigma))
    return theta * states, sigma.expand_as(states)


def model(
    states: Tensor, actions: Tensor, *, offset: float = 0.0, std: float = SIGMA_X
) -> tuple[Tensor, Tensor]:
    mean = A * states + B * actions + offset
    return mean, torch.full_like(mean, std)


def reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    return -(C * states.square() + D * actions.square()).squeeze(-1)


def value(states: Tensor) -> Tensor:
    return -(P * states.square() + K).squeeze(-1)


def action_value(states: Tensor, actions: Tensor) -> Tensor:
    mean = A * states + B * actions
    expected = -(P * (mean.square() + SIGMA_X**2) + K).squeeze(-1)
    return reward(states, actions, states) + GAMMA * expected


def episodes(n: int, steps: int, seed: int) -> Paths:
    """n real episodes of the policy."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, steps, n, 1, dtype=F64, generator=draw)
    states, actions = [torch.full((n, 1), START, dtype=F64)], []
    for eta, xi in zip(*noise, strict=True):
        actions.append(THETA * states[-1] + SIGMA * eta)
        states.append(A * states[-1] + B * actions[-1] + SIGMA_X * xi)
    return Paths(torch.stack(states), torch.stack(actions), torch.ones(steps, n, dtype=F64))


def transitions(paths: Paths) -> tuple[Transitions, Tensor]:
    """The steps of episodes as transitions [T·N], and their discounts γ^t."""
    steps, n = paths.is_alive.shape
    discounts = GAMMA ** torch.arange(steps, dtype=F64).repeat_interleave(n)
    rows = Transitions(
        paths.states[:-1].flatten(0, 1),
        paths.actions.flatten(0, 1),
        paths.states[1:].flatten(0, 1),
        torch.zeros(steps * n, dtype=F64),
    )
    return rows, discounts
