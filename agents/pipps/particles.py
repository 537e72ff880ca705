"""Particle simulation of a policy in a learned Gaussian-process model, and its policy gradient.

The loss of PIPPS as pure functions: nothing here knows stable-baselines3 or an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from totalprop.agents.trials.controllers import Controller, ControllerPolicy
from totalprop.agents.trials.problem import Cost, StateFunction
from totalprop.estimators import (
    ControlProbe,
    Estimator,
    PolicyGradient,
    assign_credit,
    gradient,
)
from totalprop.estimators.mixing import pathwise
from totalprop.world_models.gp_dynamics import GPDynamics, Prediction
from totalprop.world_models.moment_matching import take

Rows = slice | Tensor  # all particles, or the indices of some


@dataclass(frozen=True)
class Noise:
    """Every random number of one simulation; the same noise gives the same trajectories."""

    start: Tensor  # [N, S]
    model: Tensor  # [H, N, S]
    resample: Tensor | None  # [H, N, S], only for Gaussian resampling
    kept: Tensor | None = None  # [H, N, K] factors of the policy's basis functions, for dropout

    @staticmethod
    def draw(
        horizon: int,
        particles: int,
        states: int,
        generator: torch.Generator,
        *,
        resample: bool,
        n_basis: int = 0,
        dropout: float = 0.0,
    ) -> Noise:
        """Standard normal noise for one simulation, and what a dropout leaves of the policy.

        Of K = n_basis functions each is left out with probability `dropout`, in every step and
        particle of its own; the others are scaled by 1 / (1 - dropout), so that the expectation of
        their sum stays. Amadio et al. 2022 (MC-PILCO), and code (Policy.py).
        """
        shape = (horizon + 1, particles, states)
        dtype, device = torch.float64, generator.device
        first = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        second = None
        if resample:
            second = torch.randn(shape, generator=generator, dtype=dtype, device=device)[1:]
        kept = None
        if dropout > 0:
            shape = (horizon, particles, n_basis)
            is_kept = torch.rand(shape, generator=generator, device=device) >= dropout
            kept = is_kept.to(dtype) / (1 - dropout)
        return Noise(first[0], first[1:], second, kept)


@dataclass(frozen=True)
class ParticleModel:
    """What a simulation needs: dynamics, start distribution, cost.

    Attributes:
        dynamics: predicts the next state from a state and a control.
        start_mean: [S] mean of the Gaussian that particles start from; of several [M, S], in turn.
        start_std: [S] its standard deviation.
        cost: (next states, controls) -> cost of the step, differentiable.
        model_uncertainty: add the GP's own variance σ_f²; without it, "TP - σ_f" of Parmas et al.
            2018, Table 2.
        noise_multiplier: factor on the learned noise variance σ_n²; 100 is their "TP + σ_n".
        termination: states [..., S] -> whether an episode ends on arriving there, or the
            probability of that [...]; None if episodes do not end.
        termination_cost: cost of every step after the end.
    """

    dynamics: GPDynamics
    start_mean: Tensor
    start_std: Tensor
    cost: Cost
    model_uncertainty: bool = True
    noise_multiplier: float = 1.0
    termination: StateFunction | None = None
    termination_cost: float = 0.0

    @property
    def n_states(self) -> int:
        """S."""
        return self.start_mean.shape[-1]


def simulate(
    model: ParticleModel,
    policy: ControllerPolicy,
    noise: Noise,
    estimator: Estimator,
    *,
    tap: Tensor | None = None,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll particles out; the gradient of the loss is the estimator's policy gradient.

    x_{t+1} ~ N(x_t + m(x_t, u_t), σ_f² + σ_n²), independent across dimensions, u_t = π(x_t);
    J = mean_i Σ_{t=1..H} c(x_it). Parmas et al. 2018, Sec. 2.4 and 3.1. Positions that the model
    integrates have no node: they are functions of the samples, which gradients pass through.

    With a termination p(x), the cost of step t is w_t c(x_t) + (1 - w_t) c_end, where
    w_t = Π_{s<t} (1 - p(x_s)) is the probability that the particle is still on its way. A particle
    with p = 1 has ended: it stays where it is, and no later node has it among its samples.

    Args:
        model: dynamics, start and cost.
        policy: the controller π, whose parameters receive the gradient.
        noise: sets the horizon H and the number of particles N.
        estimator: the gradient estimator of every node.
        tap: [N, P] zeros; its gradient is that of each particle.
        meter: [H, E] zeros, of E predicted entries; its gradient is k.
        gauge: [H, 4, 2] zeros; its gradient measures the legs, see `estimators.gauge`.

    Returns:
        loss [], costs [H, N] (detached), states [H + 1, N, S] (detached).
    """
    horizon = len(noise.model)
    needs_probe = estimator.probe != "none" or tap is not None
    dynamics, dims = model.dynamics, model.dynamics.predicted_dims
    noise_variance = dynamics.noise.square() * model.noise_multiplier
    mean = model.start_mean.view(-1, model.n_states)
    turn = torch.arange(len(noise.start), device=mean.device) % len(mean)
    x = mean[turn] + model.start_std * noise.start
    credit = x.new_zeros(len(x))
    meters = [None] * horizon if meter is None else meter.unbind(0)
    gauges = [None] * horizon if gauge is None else gauge.unbind(0)
    states, controls, credits = [x], [], []
    act = policy.controller()
    under_way: Rows = slice(None)
    rows_of_steps: list[Rows] = []
    least = 6 if estimator.cross_fit else 3  # samples that choose k
    for t in range(horizon):
        start, u = _get(x, under_way), x.new_zeros(len(x), policy.n_controls)
        if len(start):
            kept = None if noise.kept is None else _get(noise.kept[t], under_way)
            step_controls = act(start, kept)
            found = dynamics.predict(start, step_controls)
            if model.model_uncertainty:
                std = (found.variance + noise_variance).sqrt()
            else:
                std = noise_variance.sqrt().expand_as(found.mean)
            # Too few to choose k from: their share of the loss is small, too.
            node = estimator if len(start) >= least else replace(estimator, weight=pathwise)
            probe = _control_probe(act, t, std, found, node) if needs_probe else None
            if probe is not None and not model.model_uncertainty:
                probe.zeta_jacobian[1].zero_()
            sample, credited = node(
                found.mean,
                std,
                _get(take(noise.model[t], dims, -1), under_way),
                _get(credit, under_way),
                probe=probe,
                tap=None if tap is None else _get(tap, under_way),
                meter=meters[t],
                gauge=gauges[t],
            )
            arrived = dynamics.complete(start, sample)
            if noise.resample is not None and len(start) > 1:
                arrived = gaussian_resample(arrived, _get(noise.resample[t], under_way))
            x, credit = _put(x, under_way, arrived), _put(credit, under_way, credited)
            u = _put(u, under_way, step_controls)
            rows_of_steps.append(under_way)
        states.append(x)
        controls.append(u)
        credits.append(credit)
        if model.termination is not None:
            with torch.no_grad():
                has_ended = model.termination(x) >= 1
            if has_ended.any():
                under_way = (~has_ended).nonzero().squeeze(-1)
    path, all_controls = torch.stack(states), torch.stack(controls)
    if tap is not None:
        all_controls = _TappedControls.apply(act, all_controls, tap, rows_of_steps)
    costs = model.cost(path[1:], all_controls)
    if model.termination is not None:
        is_under_way = 1 - model.termination(path[1:-1]).to(costs)
        weight = torch.cat((torch.ones_like(costs[:1]), is_under_way.cumprod(0)))
        costs = weight * costs + (1 - weight) * model.termination_cost
    loss = assign_credit(costs, torch.stack(credits)).sum(0).mean()
    return loss, costs.detach(), path.detach()


def policy_gradient(
    model: ParticleModel,
    policy: ControllerPolicy,
    noise: Noise,
    estimator: Estimator,
    *,
    per_sample: bool = False,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
) -> PolicyGradient:
    """The estimator's gradient of `simulate`'s loss, with respect to the policy's parameters.

    Args:
        model: what is simulated.
        policy: the controller.
        noise: of the simulation.
        estimator: of every node.
        per_sample: whether the gradient of each particle is asked for, too.
        meter: as in `simulate`.
        gauge: as in `simulate`.
    """

    def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
        return simulate(model, policy, noise, estimator, tap=tap, meter=meter, gauge=gauge)[0]

    return gradient(
        rollout, list(policy.parameters()), estimator,
        samples=len(noise.start), per_sample=per_sample, meter=meter, gauge=gauge,
    )  # fmt: skip


def _get(whole: Tensor, rows: Rows) -> Tensor:
    """Some of the rows; all of them without a node in the graph."""
    return whole if isinstance(rows, slice) else whole[rows]


def _put(whole: Tensor, rows: Rows, part: Tensor) -> Tensor:
    """`whole` with some of its rows replaced."""
    return part if isinstance(rows, slice) else whole.index_copy(0, rows, part)


class _TappedControls(torch.autograd.Function):
    """The controls [H, N, A], unchanged; what a cost sends back through them also enters the tap.

    That path bypasses the nodes, which would otherwise fill the tap alone.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Controller, controls: Tensor, tap: Tensor, rows_of_steps: Sequence[Rows]
    ) -> Tensor:
        ctx.act, ctx.rows_of_steps, ctx.tap_shape = act, rows_of_steps, tap.shape
        return controls.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        total = grad.new_zeros(ctx.tap_shape)
        for t, rows in enumerate(ctx.rows_of_steps):
            total[rows] += ctx.act.jacobian(t).per_sample(grad[t][rows])
        return None, grad, total, None


def gaussian_resample(x: Tensor, noise: Tensor) -> Tensor:
    """Replace particles by draws from the Gaussian fitted to them, differentiable in x.

    x'_i = mean + L z_i with L Lᵀ = covariance (Bessel-corrected). Parmas et al. 2018, Sec. 3.1.

    Args:
        x: [N, S] particles; gradients flow.
        noise: [N, S] standard normal z.
    """
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / (len(x) - 1)
    # Relative to each variance, whatever its unit.
    jitter = 1e-10 * covariance.diagonal().detach() + torch.finfo(x.dtype).tiny ** 0.5
    factor, info = torch.linalg.cholesky_ex(covariance + jitter.diag())
    # Particles that are not finite have no factor: NaN, so that the search skips the step.
    factor = torch.where(info == 0, factor, torch.nan)
    return mean + noise @ factor.T


def _control_probe(
    act: Controller, t: int, std: Tensor, found: Prediction, estimator: Estimator
) -> ControlProbe:
    std_jacobian = found.variance_jacobian / (2 * std.detach().unsqueeze(-1))
    counted = None
    if estimator.probe == "subset":
        counted = lambda: act.jacobian(t, last_layer=True)  # noqa: E731
    return ControlProbe(
        [found.mean_jacobian, std_jacobian],
        lambda: act.jacobian(t),
        counted,
    )
