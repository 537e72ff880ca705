"""What an environment returns is checked where it is wrapped."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from totalprop.agents.core.checked_env import CheckedEnv


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
