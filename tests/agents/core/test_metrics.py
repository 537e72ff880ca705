"""`record_progress`: values and keys that all agents log alike."""

import time

import gymnasium as gym
import pytest
from stable_baselines3.common.logger import Logger

from totalprop.agents import PIPPS
from totalprop.agents.core.metrics import record_progress


def test_progress_is_recorded_under_stable_baselines3_s_keys():
    agent = PIPPS("LinearPolicy", gym.make("Pendulum-v1"), device="cpu")
    agent.set_logger(Logger(None, []))
    agent._setup_learn(100)
    agent.start_time = time.time_ns() - 10**10  # 10 s ago
    agent._num_timesteps_at_start, agent.num_timesteps = 50, 250
    assert record_progress(agent) == pytest.approx(20, rel=0.05)
    assert agent.logger.name_to_value == {"time/time_elapsed": 10, "time/total_timesteps": 250}
    agent.ep_info_buffer.extend({"r": r, "l": n} for r, n in [(1.0, 3), (2.0, 6)])
    record_progress(agent)
    assert agent.logger.name_to_value["rollout/ep_rew_mean"] == 1.5
    assert agent.logger.name_to_value["rollout/ep_len_mean"] == 4.5
    assert agent.logger.name_to_excluded["time/total_timesteps"] == ("tensorboard",)
