"""Prediction of a policy in a learned Gaussian-process model, as one Gaussian per step.

The loss of PILCO as pure functions: nothing here knows stable-baselines3 or an environment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.gp_dynamics import GPDynamics, join_trig_features
from totalprop.world_models.moment_matching import (
    Gaussian,
    Image,
    KernelSteps,
    join,
    kernel_sum,
    saturate,
    symmetric,
    take,
)

# Mean and variance [...] of a step's cost, from the Gaussian of (next state, control) [..., S + A].
CostMoments = Callable[[Gaussian], tuple[Tensor, Tensor]]
Match = Callable[[Gaussian], Image]


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
    parameters = [p for p in policy.parameters() if p.requires_grad]
    is_wanted = torch.is_grad_enabled() and bool(parameters)
    match = policy.matcher(keep=is_wanted)
    difference = KernelSteps(model.dynamics.gp.kernel_sum(), keep=is_wanted)
    step = partial(propagate, model.dynamics, policy, process_noise=model.process_noise)
    with torch.no_grad():
        states, arrivals = [model.start], []
        for _ in range(horizon):
            arrivals.append(step(states[-1], match=match, difference=difference))
            states.append(arrivals[-1].marginal(range(model.start.mean.shape[-1])))
    path, arrival = _stack(states), _stack(arrivals)
    if not is_wanted:
        loss, costs = _loss(model, arrival)
        return Prediction(loss, costs, *path)
    arrival = Gaussian(*(part.requires_grad_() for part in arrival))
    loss, costs = _loss(model, arrival)
    slopes = torch.autograd.grad(loss, arrival, materialize_grads=True)
    before = Gaussian(*(part[:-1].clone().requires_grad_() for part in path))
    again = step(before, match=match.together, difference=difference.together)
    gradient = _through_time(before, again, Gaussian(*slopes), parameters)
    loss = _WithGradient.apply(loss.detach(), tuple(gradient), *parameters)
    return Prediction(loss, costs.detach(), *path)


def _loss(model: MomentModel, arrival: Gaussian) -> tuple[Tensor, Tensor]:
    """Sum of the costs, with exploration, and the expected costs [H, (M)], of all steps at once."""
    means, variances = model.cost(arrival)
    loss = means.sum(0).mean()
    if model.exploration:
        loss = loss + model.exploration * variances.clamp_min(1e-12).sqrt().sum(0).mean()
    return loss, means


def _through_time(
    x: Gaussian, arrival: Gaussian, slopes: Gaussian, parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradient of the loss by the parameters, backwards through all steps.

    The Jacobian of each step comes first, for all steps together; the recursion
    λ_t = ∂loss/∂x_t + J_tᵀ λ_{t+1} is then one product per step, where J_t is between the means and
    lower triangles of the covariances; and the parameters' gradient is again one for all steps.

    Args:
        x: [H, (M,) S] the states that the steps begin from, leaves.
        arrival: [H, (M,) S + A] what they lead to, with a graph to x and the parameters.
        slopes: [H, (M,) S + A] derivatives of the loss by what they lead to.
        parameters: of the policy.
    """
    s = x.mean.shape[-1]
    i, j = torch.tril_indices(s, s, device=x.mean.device)

    def entries(mean: Tensor, covariance: Tensor) -> Tensor:
        return torch.cat((mean[..., :s], covariance[..., i, j]), -1)

    def slope(mean: Tensor, covariance: Tensor) -> Tensor:
        """By the entries, where a symmetric matrix has each of them twice."""
        both = covariance + covariance.mT
        both = both - covariance.diagonal(dim1=-2, dim2=-1).diag_embed()
        return entries(mean, both)

    following = entries(*arrival)
    n, steps = following.shape[-1], following.shape[:-1]
    basis = torch.eye(n, dtype=x.mean.dtype, device=x.mean.device)
    basis = basis.view(n, *(1 for _ in steps), n).expand(n, *steps, n)
    # The last row is the loss by a step's start, through its own cost.
    weights = [
        torch.cat((torch.zeros_like(own).expand(n, *own.shape), own.unsqueeze(0))) for own in slopes
    ]
    weights.append(torch.cat((basis, torch.zeros_like(following).unsqueeze(0))))
    outputs = (*arrival, following)
    by_x = torch.autograd.grad(outputs, x, weights, is_grads_batched=True, retain_graph=True)
    rows = slope(*by_x)  # [entries after + 1, H, (M,) entries before]
    jacobian, own = rows[:-1].movedim(0, -2), rows[-1]
    later = torch.zeros_like(following)  # of the loss by a step's end, through all later costs
    for t in range(len(later) - 1, 0, -1):
        later[t - 1] = own[t] + (later[t].unsqueeze(-2) @ jacobian[t]).squeeze(-2)
    return torch.autograd.grad(outputs, parameters, (*slopes, later), materialize_grads=True)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient by some parameters is known."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradient: tuple[Tensor, ...], *parameters: Tensor
    ) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grad * part for part in ctx.gradient))


def propagate(
    dynamics: GPDynamics,
    policy: ControllerPolicy,
    x: Gaussian,
    *,
    process_noise: bool,
    match: Match | None = None,
    difference: Match | None = None,
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
        match: moments of the controller's output in place of `policy.match`.
        difference: moments of the state's difference in place of the model's own.

    Returns:
        [..., S + A], the control last.
    """
    s, a = x.mean.shape[-1], policy.n_controls
    joint, features = join_trig_features(x, s, dynamics.angle_dims)
    n = joint.mean.shape[-1]
    joint = join(joint, features, (match or policy.match)(joint.marginal(features)))
    before, controls = range(n, n + a), range(n + a, n + 2 * a)
    joint = join(joint, before, saturate(joint.marginal(before)))
    inputs = [*features, *controls]
    if dynamics.seen is not None:
        inputs = [inputs[i] for i in dynamics.seen]
    x_inputs = joint.marginal(inputs)
    if difference is None:
        delta_x = kernel_sum(x_inputs, dynamics.gp.kernel_sum())
    else:
        delta_x = difference(x_inputs)
    joint = join(joint, inputs, delta_x)

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
