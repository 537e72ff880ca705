"""The policy search of PIPPS: optimise a policy in a particle model for some gradient steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from stable_baselines3.common.logger import Figure, Logger
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from totalprop.agents.core import figures
from totalprop.agents.core.metrics import PICTURE, QUIET, record_gauge
from totalprop.agents.pipps.particles import Noise, ParticleModel, policy_gradient
from totalprop.agents.trials import optimisers
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.optimisers import Cooling, Evaluation
from totalprop.estimators import Estimator
from totalprop.estimators.gauge import SHAPE

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
    dropout: float
    noise_stop: float
    keep_best: bool


@dataclass
class SearchLog:
    """What happened: one entry per gradient step, and measurements every DIAGNOSE_EVERY steps."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    signal_to_noise: list[float] = field(default_factory=list)  # |g|² / tr Var(g)
    k: list[Tensor] = field(default_factory=list)  # [H, E] each
    gauges: list[Tensor] = field(default_factory=list)  # [H, 4, 2] each, for `estimators.gauge`
    skipped: int = 0  # steps whose gradient was not finite

    def record(self, logger: Logger, *, draw: bool) -> None:
        """Log the search as scalars.

        Args:
            logger: where they go.
            draw: also log a figure of k.
        """
        record = logger.record
        record("train/loss_first", self.losses[0], exclude=QUIET)
        norms = np.array(self.gradient_norms)
        record("train/gradient_norm", float(norms[np.isfinite(norms)].mean()))
        if self.signal_to_noise:
            record("train/gradient_snr", float(np.mean(self.signal_to_noise)))
        if self.k:
            k = torch.stack(self.k).mean(0)  # [H, E]
            record("train/k", float(k.mean()))
            for d, value in enumerate(k.mean(0).tolist()):
                record(f"k/coordinate_{d}", value, exclude=QUIET)
            for t, value in enumerate(k.mean(1).tolist()):
                record(f"k/step_{t + 1:02d}", value, exclude=QUIET)
            if draw:
                record("figures/k", Figure(figures.weights(k.cpu().numpy()), close=True), PICTURE)
        if self.gauges:
            record_gauge(logger, torch.stack(self.gauges).sum(0), draw=draw)
        record("train/skipped_steps", self.skipped, exclude=QUIET)


class BestSoFar:
    """The parameters whose cost was lowest, averaged over `WINDOW` successive evaluations."""

    WINDOW = 10  # the noise of one cost, and of the policy between two, is less than its changes

    def __init__(self) -> None:
        self.cost, self.parameters = math.inf, torch.empty(0)
        self._recent: deque[tuple[float, Tensor]] = deque(maxlen=self.WINDOW)

    def see(self, cost: float, parameters: Tensor) -> None:
        """Take in an evaluation of [P] parameters."""
        self._recent.append((cost, parameters))
        mean = sum(cost for cost, _ in self._recent) / self.WINDOW
        if len(self._recent) == self.WINDOW and mean < self.cost:
            self.cost, self.parameters = mean, self._recent[self.WINDOW // 2][1]


def optimise_policy(
    policy: ControllerPolicy,
    model: ParticleModel,
    settings: SearchSettings,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> SearchLog:
    """Minimise the simulated cost in place.

    Args:
        policy: the controller, whose parameters change.
        model: what is simulated.
        settings: estimator, optimiser and their sizes.
        generator: source of the simulation's noise, on the policy's device.
        on_step: called after each gradient step with its number and loss.

    Raises:
        FloatingPointError: no gradient was finite.
    """
    log, parameters = SearchLog(), list(policy.parameters())
    needs_variance = settings.optimizer == "rmsprop2018"

    cooling = None
    if settings.dropout or settings.noise_stop:
        cooling = Cooling(settings.noise_stop, settings.gradient_steps)

    def draw() -> Noise:
        # All of it, half of it, none: the policy that is found has all of its basis functions.
        dropout = 0.0 if cooling is None else settings.dropout * (1 - cooling.phase / 2)
        return Noise.draw(
            settings.horizon,
            settings.n_particles,
            model.n_states,
            generator,
            resample=settings.resample,
            n_basis=policy.n_basis,
            dropout=dropout,
        )

    fixed = draw() if settings.fixed_noise else None
    best = BestSoFar()

    def evaluate() -> Evaluation:
        noise = fixed or draw()
        number = len(log.losses)
        diagnose = number % DIAGNOSE_EVERY == 0
        meter = gauge = None
        if diagnose:
            shape = settings.horizon, len(model.dynamics.predicted_dims)
            meter = noise.start.new_zeros(shape, requires_grad=True)
            if not settings.resample:  # resampled particles depend on each other
                gauge = noise.start.new_zeros(settings.horizon, *SHAPE, requires_grad=True)

        result = policy_gradient(
            model,
            policy,
            noise,
            settings.estimator,
            per_sample=needs_variance or diagnose,
            meter=meter,
            gauge=gauge,
        )
        flat = torch.cat([g.reshape(-1) for g in result.gradients])
        log.losses.append(float(result.loss))
        log.gradient_norms.append(float(flat.norm()))
        if diagnose and result.per_sample is not None and result.k is not None:
            log.k.append(result.k)
            if result.gauge is not None:
                log.gauges.append(result.gauge)
                variance = result.per_sample.var(0).sum() * len(result.per_sample)
                tiny = torch.finfo(variance.dtype).tiny  # a gradient of 0 has no noise
                log.signal_to_noise.append(float(flat.square().sum() / variance.clamp_min(tiny)))
        if settings.keep_best:
            best.see(log.losses[-1], parameters_to_vector(parameters).detach())
        on_step(number, log.losses[-1])
        spread = None
        if needs_variance:
            assert result.per_sample is not None
            spread = result.per_sample.var(0) * len(result.per_sample)  # of a sum over particles
        return Evaluation(result.loss, flat, spread)

    rate, steps = settings.learning_rate, settings.gradient_steps
    if settings.optimizer == "adam":
        log.skipped = optimisers.adam(
            parameters,
            evaluate,
            steps=steps,
            learning_rate=rate,
            eps=settings.adam_eps,
            cooling=cooling,
        )
    elif settings.optimizer == "rmsprop2018":
        log.skipped = optimisers.rmsprop2018(
            parameters, evaluate, steps=steps, learning_rate=rate, momentum=settings.momentum
        )
    else:
        log.skipped = optimisers.quasi_newton(parameters, evaluate, evaluations=steps)
    if log.skipped == len(log.losses):
        raise FloatingPointError(
            f"none of the {log.skipped} policy gradients was finite; "
            "choose estimator 'tpx' or 'lr', or a shorter horizon"
        )
    if len(best.parameters):
        vector_to_parameters(best.parameters, parameters)
    return log
