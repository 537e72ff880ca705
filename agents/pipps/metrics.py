"""What PIPPS writes to its logger after each trial: scalars, and figures for TensorBoard."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from stable_baselines3.common.logger import Figure
from stable_baselines3.common.utils import safe_mean
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.metrics import PICTURE, QUIET
from totalprop.agents.pipps import problem as task
from totalprop.agents.pipps.search import SearchLog

if TYPE_CHECKING:
    from totalprop.agents.pipps.agent import PIPPS


def record_search(agent: PIPPS, log: SearchLog, likelihoods: Tensor) -> None:
    """Scalars of a policy search and of the model it used; the figure of k."""
    record = agent.logger.record
    record("train/loss", log.losses[-1])
    record("train/loss_first", log.losses[0], exclude=QUIET)
    norms = np.array(log.gradient_norms)
    record("train/gradient_norm", float(norms[np.isfinite(norms)].mean()))
    record("train/learning_rate", agent._settings().learning_rate)
    if log.signal_to_noise:
        record("train/gradient_snr", float(np.mean(log.signal_to_noise)))
        k = torch.stack(log.k).mean(0)  # [H, S]
        record("train/k", float(k.mean()))
        for d, value in enumerate(k.mean(0).tolist()):
            record(f"k/coordinate_{d}", value, exclude=QUIET)
        for t, value in enumerate(k.mean(1).tolist()):
            record(f"k/step_{t + 1:02d}", value, exclude=QUIET)
        if agent.tensorboard_log is not None:
            record("figures/k", Figure(figures.weights(k.cpu().numpy()), close=True), PICTURE)
    record("train/skipped_steps", log.skipped, exclude=QUIET)
    record("train/n_updates", agent._n_updates, exclude=QUIET)
    gp = agent.dynamics
    record("gp/data", len(gp.inputs))
    record("gp/jitter", gp.jitter, exclude=QUIET)
    record("gp/negative_log_likelihood", float(likelihoods.mean()))
    for e in range(gp.targets.shape[1]):
        record(f"gp/noise_{e}", float(gp.noise[e]), exclude=QUIET)
        record(f"gp/signal_{e}", float(gp.log_signal[e].exp()), exclude=QUIET)
        for d, value in enumerate(gp.log_lengthscale[e].exp().tolist()):
            record(f"gp/lengthscale_{e}_{d}", value, exclude=QUIET)


def record_model_fit(agent: PIPPS, inputs: Tensor, targets: Tensor) -> None:
    """One-step predictions of the model for a trial it has not seen.

    Standardised error: sqrt(mean z²), 1 when the predicted spread is right.
    """
    with torch.no_grad():
        posterior = agent.dynamics.posterior(inputs)
        error = targets - posterior.mean
        std = (posterior.variance + agent.dynamics.noise.square()).sqrt()
    agent.logger.record("model_fit/standardised_error", float((error / std).square().mean().sqrt()))
    for d, value in enumerate(error.square().mean(0).sqrt().tolist()):
        agent.logger.record(f"model_fit/rmse_{d}", value, exclude=QUIET)


def record_prediction(agent: PIPPS, path: np.ndarray) -> None:
    """Figure: the particles predicted before a trial, and the trial itself, [T + 1, S]."""
    if agent.tensorboard_log is not None and agent._predicted is not None:
        names = task.env_attribute(agent, "observation_names")
        if names is None or len(names) != path.shape[1]:
            names = [f"observation {d}" for d in range(path.shape[1])]
        figure = figures.prediction(agent._predicted, path, names)
        agent.logger.record("figures/prediction", Figure(figure, close=True), PICTURE)


def record_progress(agent: PIPPS) -> None:
    """Episode statistics and time, as stable-baselines3's algorithms record them."""
    seconds = max((time.time_ns() - agent.start_time) / 1e9, 1e-9)
    done = agent.num_timesteps - agent._num_timesteps_at_start
    if agent.ep_info_buffer:
        rewards = [info["r"] for info in agent.ep_info_buffer]
        agent.logger.record("rollout/ep_rew_mean", safe_mean(rewards))
        lengths = [info["l"] for info in agent.ep_info_buffer]
        agent.logger.record("rollout/ep_len_mean", safe_mean(lengths))
        agent.logger.record("rollout/ep_rew", rewards[-1])
    agent.logger.record("time/trials", agent._n_trials)
    agent.logger.record("time/fps", done / seconds)
    agent.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
    agent.logger.record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
