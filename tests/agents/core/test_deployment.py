"""A deployed policy does what `predict(deterministic=True)` does, bit for bit."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from totalprop.agents import AGENTS, DAAPPO
from totalprop.agents.core.deployment import Deployed
from totalprop.scripts.run.normalisation import normalise_like, save_statistics

MODELS = sorted(Path(__file__).parents[2].glob("golden/models/*.zip"))


def observations(space, n, rng):
    """n of a space, entries of unbounded ones within 3."""
    if isinstance(space, spaces.Dict):
        return {name: observations(part, n, rng) for name, part in space.items()}
    space.seed(int(rng.integers(2**31)))
    drawn = np.stack([space.sample() for _ in range(n)])
    is_vector = isinstance(space, spaces.Box) and space.dtype != np.uint8
    return drawn.clip(-3, 3) if is_vector else drawn


def tensors(x):
    if isinstance(x, dict):
        return {name: torch.as_tensor(part) for name, part in x.items()}
    return torch.as_tensor(x)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_deployed_policy_acts_as_predict_does(path):
    entry, rng = AGENTS[path.stem.split("_")[0]], np.random.default_rng(0)
    agent = entry.cls.load(path, device="cpu")
    module = entry.deployed(agent.policy, agent.observation_space)
    memory, state = None, module.initial_state(3)
    for step in range(4):
        seen = observations(agent.observation_space, 3, rng)
        is_first = np.array([step == 0, step == 2, False])
        expected, memory = agent.predict(seen, memory, is_first, deterministic=True)
        others = (*state, torch.as_tensor(is_first)) if module.state_names else ()
        with torch.no_grad():
            found = module(tensors(seen), *others)
        action, *state = found if module.state_names else (found,)
        np.testing.assert_array_equal(action.numpy(), expected, strict=True)
        for own, other in zip(state, memory or (), strict=True):
            np.testing.assert_array_equal(own.numpy(), other, strict=True)


def test_a_deployed_policy_normalises_as_vec_normalize_does():
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    agent = DAAPPO("MlpPolicy", env, n_steps=20, batch_size=10, seed=0).learn(40)
    seen = 1e-3 * np.arange(12, dtype=np.float32).reshape(4, 3) ** 4  # some are clipped
    expected, _ = agent.predict(env.normalize_obs(seen), deterministic=True)
    with torch.no_grad():
        found = Deployed(agent.policy, env.observation_space, env)(torch.as_tensor(seen))
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)


class Two(gym.Env):
    """Observes a vector, which is normalised, and another that is not."""

    observation_space = spaces.Dict({name: spaces.Box(-9, 9, (2,)) for name in "ab"})
    action_space = spaces.Box(-1, 1, (1,))

    def _seen(self):
        return {name: self.np_random.normal(3, 2, 2).astype(np.float32) for name in "ab"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action):
        return self._seen(), 0.0, False, True, {}


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_entries_of_a_dictionary_are_normalised_as_vec_normalize_does(keys):
    env = VecNormalize(make_vec_env(Two, 2), norm_obs_keys=keys)
    agent = DAAPPO("MultiInputPolicy", env, n_steps=20, batch_size=10, action_source="none", seed=0)
    agent.learn(40)
    seen = {name: np.arange(8, dtype=np.float32).reshape(4, 2) for name in "ab"}
    expected, _ = agent.predict(env.normalize_obs(seen), deterministic=True)
    module = Deployed(agent.policy, Two.observation_space, env)
    with torch.no_grad():
        found = module({name: torch.as_tensor(part) for name, part in seen.items()})
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)


def test_statistics_of_a_dictionary_are_written_and_read(tmp_path):
    env = VecNormalize(make_vec_env(Two, 2))
    env.reset()
    save_statistics(env, tmp_path / "statistics.json")
    made = normalise_like(make_vec_env(Two, 2), tmp_path / "statistics.json")
    seen = {name: np.ones((2, 2), np.float32) for name in "ab"}
    for name, part in env.normalize_obs(seen).items():
        np.testing.assert_array_equal(made.normalize_obs(seen)[name], part)
