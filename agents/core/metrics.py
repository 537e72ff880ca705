"""What all agents log alike: progress of a run, and which formats leave a value out."""

from __future__ import annotations

import time

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import safe_mean

# For the argument `exclude` of `logger.record`.
QUIET = ("stdout", "log")  # scalars by the dozen go to CSV, JSON and TensorBoard only
PICTURE = ("stdout", "log", "json", "csv")


def record_progress(agent: BaseAlgorithm) -> float:
    """Record episode statistics, elapsed time and steps under SB3's keys, except time/fps.

    Returns:
        Environment steps per second since `learn` began; the agent records them as time/fps.
    """
    record = agent.logger.record
    if agent.ep_info_buffer:
        record("rollout/ep_rew_mean", safe_mean([info["r"] for info in agent.ep_info_buffer]))
        record("rollout/ep_len_mean", safe_mean([info["l"] for info in agent.ep_info_buffer]))
    if agent.ep_success_buffer:
        record("rollout/success_rate", safe_mean(agent.ep_success_buffer))
    seconds = max((time.time_ns() - agent.start_time) / 1e9, 1e-9)
    record("time/time_elapsed", int(seconds), exclude="tensorboard")
    record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
    return (agent.num_timesteps - agent._num_timesteps_at_start) / seconds
