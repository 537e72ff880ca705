"""Keeps the last observation of an episode when the environment reuses its array.

Some environments write every observation into one array and return that. stable-baselines3's
DummyVecEnv keeps the last observation of an episode by reference and then resets the environment,
which overwrites it: every episode would end with the first observation of the next.
"""

from __future__ import annotations

import copy
from typing import Any, SupportsFloat

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv


class OwnTerminalObservation(gym.Wrapper):
    """Returns a copy of the observation with which an episode ends."""

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Like the environment's."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


def keep_terminal_observations(env: VecEnv) -> VecEnv:
    """Let every environment of a DummyVecEnv copy the last observation of an episode.

    The wrapper is put under the outermost one, such as a Monitor, on which `set_attr` and users'
    own code rely. SubprocVecEnv's environments are out of reach: wrap them where they are made.

    Args:
        env: any vector environment, changed in place.

    Returns:
        `env`.
    """
    inner = env.unwrapped
    if isinstance(inner, DummyVecEnv):
        for i, one in enumerate(inner.envs):
            if not _is_wrapped(one):
                if isinstance(one, gym.Wrapper):
                    one.env = OwnTerminalObservation(one.env)
                else:
                    inner.envs[i] = OwnTerminalObservation(one)
    return env


def _is_wrapped(env: gym.Env) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, OwnTerminalObservation):
            return True
        env = env.env
    return False
