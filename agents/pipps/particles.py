"""Particle simulation of a policy in a learned Gaussian-process model, and its policy gradient.

The loss of PIPPS as pure functions: nothing here knows stable-baselines3 or an environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from totalprop.agents.trials.controllers import Controller, ControllerPolicy, trig_features
from totalprop.estimators import ControlProbe, Estimator, assign_credit
from totalprop.world_models.gp import GaussianProcess, Posterior

Cost = Callable[
    [Tensor, Tensor], Tensor
]  # (next states [..., S], scaled actions [..., A]) -> [...]


@dataclass(frozen=True)
class Noise:
    """Every random number of one simulation; the same noise gives the same trajectories."""

    start: Tensor  # [N, S]
    model: Tensor  # [H, N, S]
    resample: Tensor | None  # [H, N, S], only for Gaussian resampling

    @staticmethod
    def draw(
        horizon: int, particles: int, states: int, generator: torch.Generator, *, resample: bool
    ) -> Noise:
        """Standard normal noise for one simulation."""
        shape = (horizon + 1, particles, states)
        dtype, device = torch.float64, generator.device
        first = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        second = None
        if resample:
            second = torch.randn(shape, generator=generator, dtype=dtype, device=device)[1:]
        return Noise(first[0], first[1:], second)


@dataclass(frozen=True)
class ParticleModel:
    """What a simulation needs: dynamics, start distribution, cost.

    Attributes:
        dynamics: GP from (features of x, scaled action) to the difference x' - x.
        start_mean, start_std: [S] of the Gaussian that the particles start from.
        cost: (next states, scaled actions) -> cost of the step, differentiable.
        model_uncertainty: add the GP's own variance σ_f²; off is the "TP - σ_f" of Parmas et al.
            2018, Table 2.
        noise_multiplier: factor on the learned noise variance σ_n²; 100 is their "TP + σ_n".
    """

    dynamics: GaussianProcess
    start_mean: Tensor
    start_std: Tensor
    cost: Cost
    model_uncertainty: bool = True
    noise_multiplier: float = 1.0


def simulate(
    model: ParticleModel,
    policy: ControllerPolicy,
    noise: Noise,
    estimator: Estimator,
    *,
    tap: Tensor | None = None,
    meter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll particles out; the loss's gradient is the estimator's policy gradient.

    x_{t+1} ~ N(x_t + m(x_t, u_t), σ_f² + σ_n²), independent across dimensions, u_t = π(x_t);
    J = mean_i Σ_{t=1..H} c(x_it). Parmas et al. 2018, Sec. 2.4 and 3.1.

    Args:
        noise: of shape [H, N, S]; sets horizon and particles.
        tap: zeros [N, P] for the per-particle gradients. meter: zeros [H, S] for k.
    Returns:
        loss [], costs [H, N] (detached), states [H + 1, N, S] (detached).
    """
    horizon = len(noise.model)
    needs_probe = estimator.probe != "none" or tap is not None
    noise_variance = model.dynamics.noise.square() * model.noise_multiplier
    x = model.start_mean + model.start_std * noise.start
    credit = x.new_zeros(len(x))
    meters = [None] * horizon if meter is None else meter.unbind(0)
    states, actions, credits = [x], [], []
    act = policy.controller()
    for t in range(horizon):
        u = act(x)
        moments = model.dynamics.posterior(torch.cat((trig_features(x, policy.angle_dims), u), -1))
        if model.model_uncertainty:
            std = (moments.variance + noise_variance).sqrt()
        else:
            std = noise_variance.sqrt().expand_as(moments.mean)
        probe = _control_probe(act, t, std, moments, estimator) if needs_probe else None
        if probe is not None and not model.model_uncertainty:
            probe.zeta_jacobian[1].zero_()
        x, credit = estimator(
            x + moments.mean, std, noise.model[t], credit, probe=probe, tap=tap, meter=meters[t]
        )
        if noise.resample is not None:
            x = gaussian_resample(x, noise.resample[t])
        states.append(x)
        actions.append(u)
        credits.append(credit)
    path, controls = torch.stack(states), torch.stack(actions)
    if tap is not None:
        controls = _TappedControls.apply(act, controls, tap)
    costs = model.cost(path[1:], controls)
    loss = assign_credit(costs, torch.stack(credits)).sum(0).mean()
    return loss, costs.detach(), path.detach()


class _TappedControls(torch.autograd.Function):
    """The controls [H, N, A]; what a cost sends back through them enters the tap, too."""

    @staticmethod
    def forward(ctx: Any, act: Controller, controls: Tensor, tap: Tensor) -> Tensor:
        ctx.act = act
        return controls.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        parts = [ctx.act.jacobian(t).per_sample(g) for t, g in enumerate(grad)]
        return None, grad, torch.stack(parts).sum(0)


def gaussian_resample(x: Tensor, noise: Tensor) -> Tensor:
    """Draw the particles anew from the Gaussian fitted to them, differentiable in x.

    x'_i = mean + L z_i with L Lᵀ = covariance (Bessel-corrected). Parmas et al. 2018, Sec. 3.1.

    Args:
        x, noise: [N, S].
    """
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / (len(x) - 1)
    jitter = 1e-10 * covariance.diagonal().mean().detach() + 1e-14
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor, info = torch.linalg.cholesky_ex(covariance + jitter * eye)
    factor = torch.where(
        info == 0, factor, torch.nan
    )  # of non-finite particles; the step is skipped
    return mean + noise @ factor.T


def _control_probe(
    act: Controller, t: int, std: Tensor, moments: Posterior, estimator: Estimator
) -> ControlProbe:
    controls = slice(-act.policy.n_controls, None)
    std_jacobian = moments.variance_jacobian[..., controls] / (2 * std.detach().unsqueeze(-1))
    counted = None
    if estimator.probe == "subset":
        counted = lambda: act.jacobian(t, last_layer=True)  # noqa: E731
    return ControlProbe(
        [moments.mean_jacobian[..., controls], std_jacobian],
        lambda: act.jacobian(t),
        counted,
    )
