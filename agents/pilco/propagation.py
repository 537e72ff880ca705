"""Prediction of a policy in a learned Gaussian-process model, as one Gaussian per step.

The loss of PILCO as pure functions: nothing here knows stable-baselines3 or an environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.gp_dynamics import GPDynamics, join_trig_features
from totalprop.world_models.moment_matching import (
    Gaussian,
    join,
    kernel_sum,
    saturate,
    symmetric,
    take,
)

# Mean and variance [...] of a step's cost, from the Gaussian of (next state, control) [..., S + A].
CostMoments = Callable[[Gaussian], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MomentModel:
    """What a prediction needs.

    Attributes:
        dynamics: the Gaussian processes of state differences.
        start: Gaussian [S] that predictions start from, or M of them, equally likely, [M, S].
        cost: of a step.
        process_noise: add the learned noise variance σ_n² to every predicted difference.
        exploration: factor of the standard deviation of a step's cost, added to its mean.
    """

    dynamics: GPDynamics
    start: Gaussian
    cost: CostMoments
    process_noise: bool = True
    exploration: float = 0.0


class Prediction(NamedTuple):
    """A policy's trial, as predicted."""

    loss: Tensor  # [] sum of the costs, with exploration; has the gradient
    costs: Tensor  # [H] expected, or [H, M] of M starts, detached
    means: Tensor  # [H + 1, (M,) S] of the states, detached
    covariances: Tensor  # [H + 1, (M,) S, S] detached


def predict(model: MomentModel, policy: ControllerPolicy, horizon: int) -> Prediction:
    """J = Σ_{t=1..H} E[c(x_t)]; its gradient is exact for the Gaussians, without sampling.

    Deisenroth & Rasmussen 2011, Sec. 2.2 and 2.3, and code (value.m).

    Args:
        model: dynamics, start and cost.
        policy: the controller, whose parameters receive the gradient.
        horizon: steps H.
    """
    states, arrivals = [model.start], []
    for _ in range(horizon):
        arrival = propagate(model.dynamics, policy, states[-1], process_noise=model.process_noise)
        arrivals.append(arrival)
        states.append(arrival.marginal(range(model.start.mean.shape[-1])))
    means, variances = model.cost(_stack(arrivals))  # of all steps together
    loss = means.sum(0).mean()
    if model.exploration:
        loss = loss + model.exploration * variances.clamp_min(1e-12).sqrt().sum(0).mean()
    path = _stack(states)
    return Prediction(loss, means.detach(), path.mean.detach(), path.covariance.detach())


def propagate(
    dynamics: GPDynamics, policy: ControllerPolicy, x: Gaussian, *, process_noise: bool
) -> Gaussian:
    """One step: the joint Gaussian of the next state and the control.

    State -> sines and cosines -> controller -> saturation -> GP; each function's output is joined
    to what comes before. x' = x + Δ, with cov(x, Δ) on both sides. Deisenroth & Rasmussen 2011,
    code (propagate.m), which adds no process noise.

    Args:
        dynamics: a fitted model.
        policy: the controller.
        x: [..., S] state.
        process_noise: add σ_n² to the variance of the next state.

    Returns:
        [..., S + A], the control last.
    """
    s, a = x.mean.shape[-1], policy.n_controls
    joint, features = join_trig_features(x, s, dynamics.angle_dims)
    n = joint.mean.shape[-1]
    joint = join(joint, features, policy.match(joint.marginal(features)))
    before, controls = range(n, n + a), range(n + a, n + 2 * a)
    joint = join(joint, before, saturate(joint.marginal(before)))
    inputs = [*features, *controls]
    if dynamics.seen is not None:
        inputs = [inputs[i] for i in dynamics.seen]
    joint = join(joint, inputs, kernel_sum(joint.marginal(inputs), dynamics.gp.kernel_sum()))

    def arrive(z: Tensor, axis: int) -> Tensor:
        """(x', u) of (x, ..., u, Δ), a linear map along an axis."""
        before, u = z.narrow(axis, 0, s), z.narrow(axis, n + a, a)
        dims, delta = dynamics.predicted_dims, z.narrow(axis, n + 2 * a, z.shape[axis] - n - 2 * a)
        changed = take(before, dims, axis) + delta
        after = dynamics.complete(before.movedim(axis, -1), changed.movedim(axis, -1))
        return torch.cat((after.movedim(-1, axis), u), axis)

    mean = arrive(joint.mean, -1)
    covariance = symmetric(arrive(arrive(joint.covariance, -2), -1))
    if process_noise:
        effect = dynamics.complete(x.mean.new_zeros(s), dynamics.noise.diag())  # [E, S]
        noise = torch.nn.functional.pad(effect.T @ effect, (0, a, 0, a))
        covariance = covariance + noise
    return Gaussian(mean, covariance)


def saturating(cost: SaturatingCost) -> CostMoments:
    """The cost of the next state."""
    return lambda arrival: cost.moments(arrival.marginal(range(cost.n_states)))


def minus_reward(dynamics: GPDynamics) -> CostMoments:
    """Minus the reward of a fitted model, a Gaussian process of the next state and the control."""

    def moments(arrival: Gaussian) -> tuple[Tensor, Tensor]:
        states = arrival.mean.shape[-1] - dynamics.n_controls
        controls = range(states, states + dynamics.n_controls)
        joint, features = join_trig_features(arrival, states, dynamics.angle_dims)
        inputs = joint.marginal([*features, *controls])
        reward = kernel_sum(inputs, dynamics.reward_gp.kernel_sum())
        return -reward.mean[..., 0], reward.covariance[..., 0, 0]

    return moments


def _stack(steps: list[Gaussian]) -> Gaussian:
    return Gaussian(
        torch.stack([x.mean for x in steps]), torch.stack([x.covariance for x in steps])
    )
