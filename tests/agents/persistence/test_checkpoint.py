"""When checkpoints are written and in which files. What they hold: tests/agents/contract/."""

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from tests.agents.contract.conftest import Maker
from tests.agents.contract.runs import assert_same_states, load, make_env, new_agent, state_of
from totalprop.agents import DAAPPO
from totalprop.agents.persistence import checkpoint
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.envs.rewind import Rewindable


def test_a_run_in_parts_that_end_within_a_round_equals_the_whole_one(tmp_path):
    """A checkpoint is written at the end of each part, and the next part loads it."""
    make, ends = Maker("dreamer"), [6, 22, 48, 62]
    found = {}
    for name, stops in {"whole": ends[-1:], "parts": ends}.items():
        for stop in stops:
            checkpoints = Checkpoints(tmp_path / name, every_seconds=0)
            agent = checkpoints.load(make.cls, make_env(make), "cpu") or new_agent(make)
            checkpoints.restore(agent)
            agent.learn(stop - agent.num_timesteps, checkpoints, reset_num_timesteps=False)
        found[name] = state_of(agent, tmp_path)
    assert agent.num_timesteps == 62 and agent._n_updates == 7  # rounds at 14, 22, .. 62
    assert_same_states(found["parts"], found["whole"])


def test_checkpoints_without_a_number_are_older_than_those_with_one(tmp_path):
    checkpoints, make = Checkpoints(tmp_path), Maker("pipps")
    agent = new_agent(make).learn(28, checkpoints)
    first, last = checkpoints.paths()
    first.unlink()
    last.rename(tmp_path / "checkpoint_000000000900.zip")
    assert checkpoints.newest_step() == 900
    assert load(Checkpoints(tmp_path), make).num_timesteps == 28
    agent.learn(28, checkpoints)
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint_000000000900.zip", "checkpoint_000001_000000000028.zip"
    ]  # fmt: skip


def test_a_round_longer_than_the_grace_begins_with_a_checkpoint(tmp_path, monkeypatch):
    """A signal interrupts it, and the run must not lose the rounds before it, too."""
    make = Maker("pipps")
    for grace, expected in ((0.0, [0, 14, 28]), (1000.0, [0, 28])):
        monkeypatch.setattr(checkpoint, "GRACE", grace)
        monkeypatch.setattr(checkpoint, "MAX_TIME_FRACTION", math.inf)
        monkeypatch.setattr(checkpoint, "KEPT", 9)
        checkpoints = Checkpoints(tmp_path / str(grace), every_seconds=1000.0)
        new_agent(make).learn(28, checkpoints)  # two trials of 7 steps of two environments
        assert [int(path.stem[-12:]) for path in checkpoints.paths()] == expected


def test_extra_steps_are_counted_on(tmp_path):
    make = Maker("daappo")
    agent = new_agent(make, action_source="rewind").learn(28, Checkpoints(tmp_path))
    steps = agent.source.extra_steps
    assert steps == 104  # 28 x 2 actions x 2 steps, one at the last steps of 4 episodes
    checkpoints = Checkpoints(tmp_path)
    resumed = load(checkpoints, make)
    checkpoints.restore(resumed)
    assert resumed.source.extra_steps == steps
    resumed.set_env(make_env(make))
    assert resumed.source.extra_steps == steps


class Parts(gym.Env):
    """Observations are a dictionary, far from standardised; episodes of 5 steps."""

    observation_space = spaces.Dict({name: spaces.Box(-1e3, 1e3, (2,)) for name in "ab"})
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._look(), {}

    def step(self, action):
        self.time += 1
        return self._look(), float(action[0]), False, self.time == 5, {}

    def _look(self):
        return {n: self.np_random.normal(50, 9, 2).astype(np.float32) for n in "ab"}


PPO = {"action_source": "none", "n_steps": 10, "batch_size": 10, "n_epochs": 1, "device": "cpu"}


def test_statistics_of_a_dictionarys_parts_are_in_a_checkpoint(tmp_path):
    def env():
        return VecNormalize(DummyVecEnv([Parts]))

    agent = DAAPPO("MultiInputPolicy", env(), **PPO, seed=0).learn(20, Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path)
    resumed = checkpoints.load(DAAPPO, env(), "cpu")
    checkpoints.restore(resumed)
    for name, own in agent.get_vec_normalize_env().obs_rms.items():
        found = resumed.get_vec_normalize_env().obs_rms[name]
        assert np.array_equal(found.mean, own.mean) and np.array_equal(found.var, own.var)
        assert found.count == own.count > 20
    resumed.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize("monitored", [True, False])
def test_workers_that_cannot_be_rewound_survive_a_checkpoint(tmp_path, monitored):
    """A worker that is asked for an attribute that it does not have dies."""
    env = SubprocVecEnv([lambda: Monitor(Parts()) if monitored else Parts()] * 2)
    agent = DAAPPO("MultiInputPolicy", env, **PPO).learn(20, Checkpoints(tmp_path))
    assert agent.num_timesteps == 20 and Checkpoints(tmp_path).newest_step() == 20
    env.close()


def test_a_checkpoint_holds_as_many_episodes_as_a_run_may_have(tmp_path):
    """Monitor's lists of them grow with the run, beyond what a file's JSON may hold."""
    env = Monitor(Rewindable(gym.make("CartPole-v1")))
    agent = DAAPPO("MlpPolicy", env, **PPO)
    env.episode_returns, env.episode_lengths = [1.5] * 600_000, [7] * 600_000
    agent.learn(10, Checkpoints(tmp_path))
    fresh = Monitor(Rewindable(gym.make("CartPole-v1")))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(checkpoints.load(DAAPPO, fresh, "cpu"))
    assert fresh.episode_returns == env.episode_returns
    assert fresh.episode_lengths == env.episode_lengths
    assert type(fresh.episode_lengths[0]) is int


def test_checkpoints_wait_for_their_share_of_the_time():
    checkpoints = Checkpoints("nowhere", every_seconds=10.0)
    saved = []
    checkpoints.save = lambda: saved.append(1)
    checkpoints._last -= 11.0
    checkpoints.cost = 0.5  # 2 % of 25 s
    checkpoints._on_rollout_start()
    assert not saved
    checkpoints._last -= 15.0
    checkpoints._on_rollout_start()
    assert saved
