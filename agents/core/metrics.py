"""What all agents log alike: progress of a run, and which formats leave a value out."""

from __future__ import annotations

import math
import time

from stable_baselines3.common.logger import Figure, Logger
from stable_baselines3.common.utils import safe_mean
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.algorithm import Algorithm
from totalprop.estimators.gauge import read

# For the argument `exclude` of `logger.record`.
QUIET = ("stdout", "log")  # scalars by the dozen go to files and TensorBoard only
PICTURE = ("stdout", "log", "json", "csv")  # all but TensorBoard


def record_gauge(logger: Logger, gauge: Tensor, *, draw: bool) -> None:
    """Record z and signal-to-noise ratios, leaving out what could not be measured.

    train/z, train/node_snr, train/node_snr_rp and train/node_snr_lr are means over all steps, that
    of z in the root mean square. z/step_XX and snr/step_XX, where there are several steps, go to
    TensorBoard only.

    Args:
        logger: where they go.
        gauge: [H, 4, 2] sums of the gauges at each step.
        draw: also record a figure of all four by step.
    """
    overall, by_step = read(gauge.sum(0)), read(gauge)
    for name, value in overall._asdict().items():
        if math.isfinite(value):
            logger.record(f"train/{name.replace('snr', 'node_snr')}", float(value))
    for name in ("z", "snr") if len(gauge) > 1 else ():
        for t, value in enumerate(getattr(by_step, name).tolist(), 1):
            if math.isfinite(value):
                logger.record(f"{name}/step_{t:02d}", value, exclude=PICTURE)
    if draw:
        curves = {name: values.cpu().numpy() for name, values in by_step._asdict().items()}
        logger.record("figures/z_and_snr", Figure(figures.gauges(**curves), close=True), PICTURE)


def record_progress(agent: Algorithm) -> float:
    """Record episode statistics, elapsed time and steps under SB3's keys, except time/fps.

    Returns:
        Environment steps per second since `learn` began; the agent records them as time/fps.
    """
    record = agent.logger.record
    infos, successes = agent.recent_episodes()
    if infos:
        record("rollout/ep_rew_mean", safe_mean([info["r"] for info in infos]))
        record("rollout/ep_len_mean", safe_mean([info["l"] for info in infos]))
    if successes:
        record("rollout/success_rate", safe_mean(successes))
    seconds = max((time.time_ns() - agent.start_time) / 1e9, 1e-9)
    record("time/time_elapsed", int(seconds), exclude="tensorboard")
    record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
    return (agent.num_timesteps - agent._num_timesteps_at_start) / seconds
