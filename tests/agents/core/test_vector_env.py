"""Gymnasium's vector environments do what stable-baselines3's DummyVecEnv does."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from totalprop.agents import DAAPPO, DreamerTPX
from totalprop.agents.core.vector_env import GymnasiumVecEnv
from totalprop.agents.persistence.checkpoint import Checkpoints

MODES = list(AutoresetMode)
BOX = spaces.Box(-1e3, 1e3, (2,), np.float32)


class Task(gym.Env):
    """Observations (episode, time); ends after 3 or 4 steps, every second episode by truncation."""

    def __init__(self, number=0, observation=BOX):
        self.observation_space, self.action_space = observation, spaces.Box(-1, 1, (1,))
        self.number, self.episode = number, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._seen(), {"began": self.episode}

    def step(self, action):
        self.t += 1
        is_over, cut = self.t == 3 + self.number, self.episode % 2 == 0
        return self._seen(), float(action[0]), is_over and not cut, is_over and cut, {"t": self.t}

    def _seen(self):
        seen = np.array([self.episode, self.t], np.float32)
        if isinstance(self.observation_space, spaces.Dict):
            return {"a": seen[:1], "b": seen[1:]}
        return seen


def makers(observation=BOX):
    return [lambda i=i: Task(i, observation) for i in range(2)]


def trace(env, steps=12):
    """Everything a vector environment returns."""
    found = [env.reset()]
    for t in range(steps):
        observations, rewards, dones, infos = env.step(np.full((2, 1), t / 10, np.float32))
        for info, done in zip(infos, dones, strict=True):
            assert done or not info.get("TimeLimit.truncated")
            if not done:  # DummyVecEnv says False at each step
                info.pop("TimeLimit.truncated", None)
        found.append((observations, rewards, dones, infos, list(env.reset_infos)))
    return found


class EndsBothWays(Task):
    def step(self, action):
        observation, reward, *_, info = super().step(action)
        return observation, reward, True, True, info


@pytest.mark.parametrize("mode", MODES)
def test_an_end_in_the_last_step_before_the_limit_is_an_end(mode):
    """As in a DummyVecEnv: its value is 0, and not bootstrapped."""
    env = GymnasiumVecEnv(SyncVectorEnv([EndsBothWays], autoreset_mode=mode))
    env.reset()
    _, _, dones, infos = env.step(np.zeros((1, 1), np.float32))
    assert dones.tolist() == [True] and infos[0]["TimeLimit.truncated"] is False


def test_wrappers_of_environments_in_this_process_are_seen():
    """A cost that speaks of unwrapped observations is then not used, as in a DummyVecEnv."""

    def doubled():
        return TransformObservation(Task(), lambda x: 2 * x, BOX)

    for env, expected in ((SyncVectorEnv([doubled]), True), (SyncVectorEnv([Task]), False)):
        found = GymnasiumVecEnv(env)
        assert found.env_is_wrapped(gym.ObservationWrapper) == [expected]
        assert found.env_is_wrapped(Monitor) == [False]


def test_a_run_in_a_vectorised_environment_is_seeded_and_resumed(tmp_path):
    """It takes one seed, not a list."""

    def env():
        return gym.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")

    settings = {"action_source": "none", "n_steps": 8, "batch_size": 24, "device": "cpu"}
    wrapped = GymnasiumVecEnv(env())
    wrapped.seed(5)
    first = wrapped.reset()
    wrapped.seed(5)
    assert np.array_equal(wrapped.reset(), first)
    made = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    DAAPPO("MlpPolicy", made, **settings, seed=0).learn(24, Checkpoints(tmp_path))
    again = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    resumed = Checkpoints(tmp_path).load(DAAPPO, again, "cpu")
    assert resumed.num_timesteps == 24 and resumed.n_envs == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("is_dict", [False, True])
def test_it_returns_what_a_dummy_vec_env_returns(kind, mode, is_dict):
    half = spaces.Box(-1e3, 1e3, (1,), np.float32)
    observation = spaces.Dict({"a": half, "b": half}) if is_dict else BOX
    expected = trace(DummyVecEnv(makers(observation)))
    env = GymnasiumVecEnv(kind(makers(observation), autoreset_mode=mode))
    try:
        np.testing.assert_equal(trace(env), expected)
    finally:
        env.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("agent_class", [DreamerTPX, DAAPPO])
def test_agents_learn_the_same_as_from_a_vec_env(agent_class, mode, tmp_path):
    settings = {"seed": 0, "device": "cpu"}
    if agent_class is DreamerTPX:
        sizes = {"deter": 4, "hidden": 4, "width": 4, "stoch": 2}
        settings |= {"policy_kwargs": sizes, "sequence_length": 4, "batch_size": 2, "horizon": 3,
                     "learning_starts": 10, "train_freq": 10, "gradient_steps": 1}  # fmt: skip
    else:
        settings |= {"n_steps": 10, "batch_size": 10, "n_epochs": 1, "dynamics_width": 4}
    policy = next(iter(agent_class.policy_aliases))
    kind = AsyncVectorEnv if mode is AutoresetMode.SAME_STEP else SyncVectorEnv
    envs = VecMonitor(DummyVecEnv(makers())), kind(makers(), autoreset_mode=mode)
    agents = [
        agent_class(policy, env, **settings).learn(40, Checkpoints(tmp_path / str(i)))
        for i, env in enumerate(envs)
    ]
    envs[1].close()
    assert len(agents[0].ep_info_buffer) > 4
    for ours, theirs in zip(*(agent.policy.state_dict().values() for agent in agents)):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    for key in ("r", "l"):
        first, second = ([info[key] for info in agent.ep_info_buffer] for agent in agents)
        assert first == second


def test_one_that_ignores_the_mask_is_refused():
    agent = DAAPPO("MlpPolicy", gym.make_vec("CartPole-v1", num_envs=3), action_source="none")
    with pytest.raises(ValueError, match="ignores reset_mask"):
        agent.learn(200)


def test_one_that_does_not_say_how_it_resets_is_refused():
    env = SyncVectorEnv(makers())
    env.metadata = {}
    with pytest.raises(ValueError, match="must say how it resets"):
        DAAPPO("MlpPolicy", env)


def test_options_reach_the_environments_or_are_refused():
    class Notes(Task):
        def reset(self, *, seed=None, options=None):
            self.given = options
            return super().reset(seed=seed, options=options)

    inner = SyncVectorEnv([Notes, Notes])
    env = GymnasiumVecEnv(inner)
    env.set_options([{"goal": np.arange(2)}, {"goal": np.arange(2)}])
    env.reset()
    assert [list(one.given["goal"]) for one in inner.envs] == [[0, 1]] * 2
    env.set_options({"x": 1})
    env.reset()
    assert [one.given for one in inner.envs] == [{"x": 1}] * 2
    env.reset()  # they are for one reset
    assert not any(one.given for one in inner.envs)
    env.set_options([{"x": 1}, {"x": 2}])
    with pytest.raises(ValueError, match="the same options for all"):
        env.reset()
