"""What goes wrong in an environment is an error with words, not a result."""

import gymnasium as gym
import pytest
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor

from tests.agents.contract.environments import BrokenEnv


@pytest.mark.parametrize("where", ["observation", "reward", "reset"])
def test_non_finite_values_of_the_environment_are_one_clear_sentence(make, where):
    name = "reward" if where == "reward" else "observation"
    agent = make(BrokenEnv(where))
    with pytest.raises(ValueError, match=f"environment returned a non-finite {name}") as error:
        agent.learn(28)
    message = str(error.value)
    assert "\n" not in message and "fix the environment" in message
    assert agent.num_timesteps <= 3


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
