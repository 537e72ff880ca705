"""What an environment returns is checked where it is wrapped."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from totalprop.agents.core.checked_env import CheckedEnv, check_environments


class TwoParts(gym.Env):
    observation_space = spaces.Dict({name: spaces.Box(-1, 1, (2,)) for name in "ab"})
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, names):
        self.names = names

    def reset(self, *, seed=None, options=None):
        return {name: np.zeros(2, np.float32) for name in self.names}, {}


@pytest.mark.parametrize("names", ["a", "ac", "c", ""])
def test_a_dictionary_without_a_part_of_the_space_is_refused(names):
    with pytest.raises(ValueError, match=r"reset\(\) of TwoParts returned .*make them agree"):
        CheckedEnv(TwoParts(names)).reset()


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_parts_that_the_space_does_not_have_are_let_through(names):
    assert set(CheckedEnv(TwoParts(names)).reset()[0]) == set(names)


class Raw(gym.Env):
    observation_space = action_space = spaces.Box(-1, 1, (1,))
    charge = 3.0

    def battery(self):
        return self.charge

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


class Uses(gym.Wrapper):
    def step(self, action):
        *rest, info = self.env.step(action)
        return (*rest, {**info, "battery": self.env.battery(), "charge": self.env.charge})


def test_wrappers_reach_what_the_environment_offers():
    env = check_environments(DummyVecEnv([lambda: Uses(Raw())]))
    env.reset()
    info = env.step(np.zeros((1, 1)))[3][0]
    assert info["battery"] == info["charge"] == 3
    env.env_method("set_wrapper_attr", "charge", 5.0)
    assert env.envs[0].unwrapped.charge == 5 and env.step(np.zeros((1, 1)))[3][0]["battery"] == 5
    with pytest.raises(AttributeError, match="no_such"):
        env.envs[0].env.no_such  # noqa: B018
    assert copy.deepcopy(CheckedEnv(Raw())).battery() == 3
    assert pickle.loads(pickle.dumps(CheckedEnv(Raw()))).battery() == 3


def test_attributes_are_the_environments():
    """Also those that a callback sets: `CheckedEnv` has none of its own."""
    bare, inside = Raw(), Raw()
    env = check_environments(DummyVecEnv([lambda: bare, lambda: Uses(inside)]))
    env.set_attr("charge", 4.0, indices=0)
    assert bare.charge == 4 and env.get_attr("charge", indices=0) == [4]
    env.envs[0].charge, env.envs[1].env.charge = 6.0, 7.0
    assert (bare.charge, inside.charge) == (6, 7)
    env.envs[0].observation_space = spaces.Box(0, 1, (1,))
    assert env.envs[0].observation_space == bare.observation_space == spaces.Box(0, 1, (1,))
