"""What goes wrong in an environment is an error with words, not a result."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor

from tests.agents.contract.environments import BrokenEnv, CountingEnv
from tests.agents.contract.probes import assert_same


@pytest.mark.parametrize("where", ["observation", "reward", "reset"])
def test_non_finite_values_of_the_environment_are_one_clear_sentence(make, where):
    name = "reward" if where == "reward" else "observation"
    agent = make(BrokenEnv(where))
    with pytest.raises(ValueError, match=f"environment returned a non-finite {name}") as error:
        agent.learn(28)
    message = str(error.value)
    assert "\n" not in message and "fix the environment" in message
    assert agent.num_timesteps <= 3 and f"at step {agent.num_timesteps}:" in message


class Faulty(CountingEnv):
    """An environment that does not keep to Gymnasium's interface."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        if self.fault == "wide reset":
            observation = np.zeros(5, np.float32)
        return observation if self.fault == "old reset" else (observation, info)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.fault == "scalar":  # NumPy would broadcast it
            observation = np.zeros(1, np.float32)
        reward = {"array": np.ones(1), "none": None, "text": "1"}.get(self.fault, reward)
        info = None if self.fault == "no info" else info
        if self.fault == "old step":
            return observation, reward, terminated, info
        return observation, reward, terminated, truncated, info


FAULTS = {
    "old step": r"step\(\) of Faulty returned 4 values, expected \(observation, .*shimmy",
    "old reset": r"reset\(\) of Faulty returned a ndarray, expected \(observation, info\)",
    "scalar": r"step\(\) of Faulty returned an observation of shape \[1\], .* says \[4\]",
    "array": r"step\(\) of Faulty returned the reward array\(\[1\.\]\), expected one number",
    "none": r"step\(\) of Faulty returned the reward None, expected one number",
    "text": r"step\(\) of Faulty returned the reward '1', expected one number",
    "no info": r"step\(\) of Faulty returned the info None, expected a dictionary",
    "wide reset": r"reset\(\) of Faulty returned an observation of shape \[5\], .* says \[4\]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_gymnasiums_is_one_sentence(make, fault):
    with pytest.raises(ValueError, match=FAULTS[fault]) as error:
        make(Faulty(fault)).learn(28)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("maker", [CountingEnv, lambda: CountingEnv()], ids=["class", "function"])
def test_what_makes_an_environment_is_none(make, maker):
    with pytest.raises(ValueError, match=r"needs an environment or its id, got <.*; call it"):
        make(maker)


class Listing(CountingEnv):
    """Observes lists of numbers."""

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return observation.tolist(), info

    def step(self, action):
        observation, *rest = super().step(action)
        return observation.tolist(), *rest


def test_lists_are_observations_too(make):
    """Also the last one of an episode, which no buffer has made an array of."""
    listed, own = make(Listing()).learn(28), make(CountingEnv()).learn(28)
    assert_same(listed.get_parameters(), own.get_parameters())


def test_an_old_step_inside_of_a_time_limit_is_one_sentence(make):
    """Gymnasium's wrappers unpack five values and raise an error of their own."""
    limited = gym.wrappers.TimeLimit(Faulty("old step"), 7)
    with pytest.raises(ValueError, match="Faulty returned another number of values, expected"):
        make(limited).learn(28)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_worker_process_that_dies(make, is_wrapped):
    workers = SubprocVecEnv([lambda: gym.make("Pendulum-v1")] * 2, start_method="forkserver")
    env = VecMonitor(workers) if is_wrapped else workers

    def kill(variables, _):
        if variables["self"].num_timesteps >= 10:
            workers.processes[1].kill()
        return True

    with pytest.raises(RuntimeError, match=r"process\(es\) 1 of 2 \(exit code -9\) died"):
        make(env).learn(1000, callback=kill)
    workers.processes[0].kill()


class StaleInfo(CountingEnv):
    """Its infos hold what gym's old vector environments put there on every step."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def step(self, action):
        *others, info = super().step(action)
        return *others, {**info, "terminal_observation": self.value}


@pytest.mark.parametrize(
    "value", [None, "", np.full(4, np.nan, np.float32)], ids=["None", "text", "NaN"]
)
def test_terminal_observations_are_read_only_where_an_episode_ended(make, value):
    """What the infos of other steps hold under that name changes nothing."""
    found = [make(env).learn(28).get_parameters() for env in (StaleInfo(value), CountingEnv())]
    assert_same(*found)
