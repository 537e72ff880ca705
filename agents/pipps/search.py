"""The inner loop of PIPPS: optimise a policy in a particle model for a number of gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from totalprop.agents.pipps.particles import Noise, ParticleModel, simulate
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.estimators import Estimator, PolicyGradient, gradient

DIAGNOSE_EVERY = 25  # gradient steps between measurements of k and of the gradient's noise

OptimizerName = Literal["adam", "rmsprop2018", "quasi-newton"]


@dataclass(frozen=True)
class SearchSettings:
    """How a policy is optimised in the model; see `agents.PIPPS` for the meaning of each."""

    estimator: Estimator
    optimizer: OptimizerName
    learning_rate: float
    gradient_steps: int
    n_particles: int
    horizon: int
    resample: bool
    fixed_noise: bool
    adam_eps: float
    momentum: float


@dataclass
class SearchLog:
    """What happened: one entry per gradient step, and measurements every DIAGNOSE_EVERY steps."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    signal_to_noise: list[float] = field(default_factory=list)  # |g|² / tr Var(g)
    k: list[Tensor] = field(default_factory=list)  # [H, S] each
    skipped: int = 0  # steps whose gradient was not finite


class _Step(NamedTuple):
    result: PolicyGradient
    flat: Tensor  # [P]


def optimise_policy(
    policy: ControllerPolicy,
    model: ParticleModel,
    settings: SearchSettings,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> SearchLog:
    """Minimise the simulated cost in place.

    Args:
        generator: source of the simulation's noise, on the policy's device.
        on_step: called after each gradient step with its number and loss.
    Raises:
        FloatingPointError: not one gradient was finite.
    """
    log, parameters = SearchLog(), list(policy.parameters())
    n_states = len(model.start_mean)

    def draw() -> Noise:
        return Noise.draw(
            settings.horizon, settings.n_particles, n_states, generator, resample=settings.resample
        )

    fixed = draw() if settings.fixed_noise else None

    def step(per_sample: bool = False) -> _Step:
        noise = fixed or draw()
        number = len(log.losses)
        diagnose = number % DIAGNOSE_EVERY == 0
        meter = None
        if diagnose:
            meter = noise.start.new_zeros(settings.horizon, n_states, requires_grad=True)
        result = gradient(
            lambda estimator, tap: simulate(model, policy, noise, estimator, tap=tap, meter=meter)[
                0
            ],
            parameters,
            settings.estimator,
            samples=settings.n_particles,
            per_sample=per_sample or diagnose,
            meter=meter,
        )
        flat = torch.cat([g.reshape(-1) for g in result.gradients])
        log.losses.append(float(result.loss))
        log.gradient_norms.append(float(flat.norm()))
        if diagnose and result.per_sample is not None and result.k is not None:
            log.k.append(result.k)
            if not settings.resample:  # which makes the particles depend on each other
                variance = result.per_sample.var(0).sum() * len(result.per_sample)
                tiny = torch.finfo(variance.dtype).tiny  # a gradient of 0 has no noise
                log.signal_to_noise.append(float(flat.square().sum() / variance.clamp_min(tiny)))
        on_step(number, log.losses[-1])
        return _Step(result, flat)

    if settings.optimizer == "quasi-newton":
        _quasi_newton(parameters, step, settings.gradient_steps, log)
    elif settings.optimizer == "adam":
        _adam(parameters, step, settings, log)
    else:
        _rmsprop2018(parameters, step, settings, log)
    if log.skipped == len(log.losses):
        raise FloatingPointError(
            f"none of the {log.skipped} policy gradients was finite; "
            "choose estimator 'tpx' or 'lr', or a shorter horizon"
        )
    return log


def _adam(
    parameters: Sequence[Tensor],
    step: Callable[..., _Step],
    settings: SearchSettings,
    log: SearchLog,
) -> None:
    """Adam, started anew for every search (as the authors' demo does)."""
    adam = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=settings.adam_eps)
    for _ in range(settings.gradient_steps):
        result, flat = step()
        if not torch.isfinite(flat).all():
            log.skipped += 1
            continue
        for parameter, g in zip(parameters, result.gradients, strict=True):
            parameter.grad = g
        adam.step()


def _rmsprop2018(
    parameters: Sequence[Tensor],
    step: Callable[..., _Step],
    settings: SearchSettings,
    log: SearchLog,
) -> None:
    """m ← γ m + g / √z, θ ← θ - α m, z = E[g]² + V[g]. Parmas et al. 2018, Sec. 3.3.

    V[g] is the variance of the mean: the particles' sample variance / N. The displayed equation has
    E[g²] + V[g]; the text defines z as here.
    """
    momentum = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    momentum = momentum.to(parameters[0].device)
    for _ in range(settings.gradient_steps):
        result, flat = step(per_sample=True)
        assert result.per_sample is not None
        variance = result.per_sample.var(0) * len(result.per_sample)  # of the sum over particles
        direction = flat / (flat.square() + variance).sqrt().clamp_min(1e-30)
        if not torch.isfinite(direction).all():
            log.skipped += 1
            continue
        momentum = settings.momentum * momentum + direction
        with torch.no_grad():
            theta = parameters_to_vector(parameters) - settings.learning_rate * momentum
            vector_to_parameters(theta, parameters)


def _quasi_newton(
    parameters: Sequence[Tensor], step: Callable[..., _Step], evaluations: int, log: SearchLog
) -> None:
    """L-BFGS on an objective made deterministic by fixed noise (PIPPS 2018, Sec. 3.3).

    The parameters become the best that were evaluated: a line search that fails returns its start.
    """
    least = math.inf
    best = start = parameters_to_vector(parameters).detach().cpu().numpy()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            vector_to_parameters(torch.as_tensor(theta, device=parameters[0].device), parameters)
        result, flat = step()
        if not (torch.isfinite(result.loss) and torch.isfinite(flat).all()):
            log.skipped += 1
            return 1e25, np.zeros_like(theta)  # a wall: the line search steps back
        nonlocal least, best
        if float(result.loss) < least:
            least, best = float(result.loss), theta.copy()
        return float(result.loss), flat.cpu().numpy()

    minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxfun": evaluations})
    with torch.no_grad():
        vector_to_parameters(torch.as_tensor(best, device=parameters[0].device), parameters)
