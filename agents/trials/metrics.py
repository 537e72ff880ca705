"""What agents that learn from trials log of their model.

What is particular to a policy search is logged by the agent that makes it; the progress of a run is
logged as in all agents, see agents/core/metrics.py.
"""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.common.logger import Figure, Logger
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.metrics import PICTURE, QUIET
from totalprop.agents.trials.problem import Problem
from totalprop.world_models.gp_dynamics import GPDynamics


def record_gp(logger: Logger, model: GPDynamics, likelihoods: Tensor) -> None:
    """Size and hyper-parameters of the dynamics.

    Args:
        logger: where the scalars go.
        model: the fitted model.
        likelihoods: [E] negative log likelihoods per data point, from its last fit.
    """
    gp, record = model.gp, logger.record
    record("gp/data", model.n_points)
    record("gp/jitter", gp.jitter, exclude=QUIET)
    record("gp/negative_log_likelihood", float(likelihoods.mean()))
    for e in range(gp.targets.shape[1]):
        record(f"gp/noise_{e}", float(gp.noise[e]), exclude=QUIET)
        record(f"gp/signal_{e}", float(gp.log_signal[e].exp()), exclude=QUIET)
        for d, value in enumerate(gp.log_lengthscale[e].exp().tolist()):
            record(f"gp/lengthscale_{e}_{d}", value, exclude=QUIET)


def record_model_fit(
    logger: Logger, model: GPDynamics, states: Tensor, controls: Tensor, next_states: Tensor
) -> None:
    """One-step predictions of the model for a trial that it has not seen.

    Standardised error: sqrt(mean z²), 1 when the predicted spread is right.

    Args:
        logger: where the scalars go.
        model: the fitted model.
        states: [n, S].
        controls: [n, A].
        next_states: [n, S].
    """
    with torch.no_grad():
        posterior = model.gp.posterior(model.dynamics_inputs(states, controls))
        error = (next_states - states)[:, model.predicted_dims] - posterior.mean
        std = (posterior.variance + model.noise.square()).sqrt()
    logger.record("model_fit/standardised_error", float((error / std).square().mean().sqrt()))
    for d, value in enumerate(error.square().mean(0).sqrt().tolist()):
        logger.record(f"model_fit/rmse_{d}", value, exclude=QUIET)


def record_prediction(
    logger: Logger, problem: Problem, predicted: np.ndarray, path: np.ndarray
) -> None:
    """Figure of the particles predicted before a trial, and of the trial itself.

    Args:
        logger: where the figure goes.
        problem: has the observations' names.
        predicted: [H + 1, N, S].
        path: [T + 1, S].
    """
    figure = figures.prediction(predicted, path, problem.observation_names)
    logger.record("figures/prediction", Figure(figure, close=True), PICTURE)
