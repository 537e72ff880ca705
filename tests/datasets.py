"""Minari datasets for tests, written by Minari itself. Their folder is MINARI_DATASETS_PATH."""

import warnings
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector.episode_buffer import EpisodeBuffer


def store(name: str, buffers: list[EpisodeBuffer], of: Any, **kwargs: Any) -> minari.MinariDataset:
    """Write a dataset of episodes.

    Args:
        name: id of the dataset.
        buffers: its episodes.
        of: what has the spaces; with a `spec`, it is the environment that the dataset names.
        **kwargs: to Minari.
    """
    if getattr(of, "spec", None) is not None:
        kwargs = {"env": of, **kwargs}
    with warnings.catch_warnings():  # that it names no author
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=of.observation_space, action_space=of.action_space,
            **kwargs,
        )  # fmt: skip


def buffer(observations: list, actions: list, rewards: list, *, terminated: bool) -> EpisodeBuffer:
    """An episode that terminated, or was truncated."""
    n = len(rewards)
    ends = np.arange(n) == n - 1
    return EpisodeBuffer(
        observations=stacked(observations), actions=np.array(actions), rewards=np.array(rewards),
        terminations=ends & terminated, truncations=ends & (not terminated),
    )  # fmt: skip


def stacked(observations: list) -> Any:
    """Observations as Minari stores them: an array, or a dictionary of arrays."""
    if isinstance(observations[0], dict):
        return {name: np.array([o[name] for o in observations]) for name in observations[0]}
    return np.array(observations)


def play(env: gym.Env, episodes: int, seed: int = 0) -> list[EpisodeBuffer]:
    """Episodes of random actions in an environment."""
    env.action_space.seed(seed)
    found = []
    for i in range(episodes):
        seen, actions, rewards = [env.reset(seed=seed + i)[0]], [], []
        while True:
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            seen.append(observation), rewards.append(reward)
            if terminated or truncated:
                break
        found.append(buffer(seen, actions, rewards, terminated=terminated))
    return found
