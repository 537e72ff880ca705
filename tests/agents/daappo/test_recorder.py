"""What is recorded of a rollout: raw transitions, true last states, order, time limits."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from totalprop.agents import DAAPPO
from totalprop.agents.daappo.recorder import ManyActionRolloutBuffer
from totalprop.agents.daappo.sources import ExtraActions

LENGTH, STEPS = 5, 12
TINY = {
    "n_steps": STEPS, "batch_size": 6, "n_epochs": 1, "dynamics_width": 4, "n_extra_actions": 2,
    "simulation_horizon": 2, "seed": 0, "device": "cpu",
}  # fmt: skip


class CountingEnv(gym.Env):
    """Observes (episode, time, previous action); the reward is 10 times the new time.

    Ends after 5 steps. Actions lie in [-0.1, 0.1], so that almost all are clipped.
    """

    action_space = spaces.Box(-0.1, 0.1, (1,), np.float32)

    def __init__(self, first=0, truncates=True, bad=None, dtype=np.float32):
        self.observation_space = spaces.Box(-1e3, 1e3, (3,), dtype)
        self.episode, self.truncates, self.bad, self.dtype = first, truncates, bad, dtype

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0, 0], self.dtype), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        observation = np.array([self.episode, self.time, action[0]], self.dtype)
        done, reward = self.time >= LENGTH, 10.0 * self.time
        if self.bad == self.time:
            observation *= np.nan
        elif self.bad == -self.time:
            reward = np.inf
        return observation, reward, done and not self.truncates, done and self.truncates, {}


def vector(n=3, normalise=False, **settings):
    env = DummyVecEnv([lambda i=i: CountingEnv(100 * i, **settings) for i in range(n)])
    if not normalise:
        return env
    return VecNormalize(env, **(normalise if isinstance(normalise, dict) else {}))


@pytest.fixture
def make(monkeypatch):
    """An agent after rollouts without updates, with the buffer that an update would read."""

    def made(env, n=1, **changes):
        monkeypatch.setattr(DAAPPO, "_train_epochs", lambda agent: None)
        monkeypatch.setattr("stable_baselines3.PPO.train", lambda agent: None)
        agent = DAAPPO("MlpPolicy", env, **{**TINY, **changes})
        return agent.learn(n * STEPS * agent.n_envs)

    return made


NORMALISED = {
    "plain": False,
    "normalised": {},
    "rewards": {"norm_obs": False},
    "states": {"norm_reward": False},
}


@pytest.mark.parametrize("normalise", NORMALISED.values(), ids=NORMALISED)
@pytest.mark.parametrize("truncates", [True, False])
def test_transitions_are_raw_and_lead_to_the_true_end(make, normalise, truncates):
    agent = make(vector(normalise=normalise, truncates=truncates), n=2)
    kept = agent.source.transitions
    assert len(kept) == 2 * STEPS * 3
    n = len(kept)
    states, actions, after = kept.states[:n], kept.actions[:n], kept.next_states[:n]
    # An end's is normalised and back: in single precision.
    tolerance = {"atol": 2e-3} if normalise is not False else {"atol": 0}
    order = [(step, env) for step in range(2 * STEPS) for env in range(3)]
    episodes = [100 * env + step // LENGTH + 1 for step, env in order]
    times = np.array([step % LENGTH for step, _ in order])
    np.testing.assert_allclose(states[:, 0], episodes, **tolerance)
    np.testing.assert_allclose(states[:, 1], times, **tolerance)
    np.testing.assert_allclose(after[:, 0], episodes, **tolerance)
    np.testing.assert_allclose(after[:, 1], times + 1, **tolerance)
    np.testing.assert_allclose(after[:, 2], actions[:, 0], **tolerance)
    np.testing.assert_allclose(kept.rewards[:n], 10 * (times + 1), rtol=1e-6)
    assert (np.abs(actions) <= 0.1).all() and np.abs(agent.rollout_buffer.actions).max() > 0.5


@pytest.mark.parametrize("clip", [0.7, 1.3, 10.0])
def test_ends_that_vec_normalize_clips_are_left_out(make, clip):
    """Its statistics have times 0 to 4; the last, 5, lies 2.1 deviations from their mean."""
    env = vector(normalise={"clip_obs": clip})
    kept = make(env, n=2).source.transitions
    n, ends = len(kept), kept.next_states[: len(kept), 1].round(2)
    limits = env.obs_rms.mean[1] + np.array([-1, 1]) * clip * env.obs_rms.var[1] ** 0.5
    assert set(ends) <= {1, 2, 3, 4, 5} and {1, 2, 3, 4} <= set(ends)  # all of them true
    np.testing.assert_allclose(kept.next_states[:n, 2], kept.actions[:n, 0], atol=2e-3)
    np.testing.assert_allclose(kept.rewards[:n], 10 * ends, rtol=1e-6)
    if clip == 10.0:
        assert n == 2 * STEPS * 3
    else:
        assert limits[1] < 5 and 5 not in ends and n == 2 * STEPS * 3 - 3 * (2 * STEPS // LENGTH)


def test_a_model_of_no_transition_is_refused():
    """Every step ends its episode, and the statistics have only seen the constant first state."""

    class OneStep(CountingEnv):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            self.time = LENGTH - 1
            return np.zeros(3, np.float32), {}

    env = VecNormalize(DummyVecEnv([OneStep]))
    with pytest.raises(ValueError, match=r"no transition is known.*larger clip_obs"):
        DAAPPO("MlpPolicy", env, **TINY).learn(STEPS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_states_are_in_the_buffers_flat_order(make, dtype):
    agent = make(vector(dtype=dtype))
    states, buffer = agent._recorder.flat_states(), agent.rollout_buffer
    np.testing.assert_array_equal(states, buffer.swap_and_flatten(buffer.observations))
    assert states.dtype == dtype and states.shape == (3 * STEPS, 3)
    assert (states[:STEPS, 0] < 100).all() and (states[-STEPS:, 0] > 200).all()
    list(buffer.get())  # flattens in place
    np.testing.assert_array_equal(states, buffer.observations)


def test_states_are_raw_under_vec_normalize(make):
    agent = make(vector(normalise=True), n=2)
    states = agent._recorder.flat_states().reshape(3, STEPS, 3)
    times = (np.arange(STEPS, 2 * STEPS)) % LENGTH
    np.testing.assert_array_equal(states[:, :, 1], np.tile(times, (3, 1)))
    assert not np.allclose(agent.rollout_buffer.observations.max(), states.max())


@pytest.mark.parametrize("source", ["none", "dynamics", "q", "states"])
@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("timeout_bootstrap", [True, False])
def test_timeout_bootstrap_decides_what_follows_a_time_limit(
    make, source, truncates, timeout_bootstrap
):
    agent = make(
        vector(1, truncates=truncates), action_source=source, timeout_bootstrap=timeout_bootstrap
    )
    buffer = agent.rollout_buffer
    times = np.arange(STEPS) % LENGTH
    expected = 10.0 * (times + 1)
    if truncates and timeout_bootstrap:
        for t in np.flatnonzero(times == LENGTH - 1):
            action = np.clip(buffer.actions[t, 0, 0], -0.1, 0.1)
            end = torch.tensor([[t // LENGTH + 1, LENGTH, action]])
            expected[t] += agent.gamma * float(agent.policy.predict_values(end).detach())
        assert not np.allclose(expected, 10.0 * (times + 1))
    np.testing.assert_allclose(buffer.rewards[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "name"), [(2, "observation"), (LENGTH, "observation"), (-3, "reward")]
)
@pytest.mark.parametrize("source", ["dynamics", "none"])
@pytest.mark.parametrize("normalise", [False, {}])
def test_numbers_that_are_none_are_refused(make, bad, name, source, normalise):
    """Also at the end of an episode, where the next observation is the reset's."""
    with pytest.raises(ValueError, match=f"non-finite {name} at step {abs(bad)}"):
        make(vector(1, normalise, bad=bad), action_source=source)


class NamedEnv(CountingEnv):
    """Its observation is a dictionary, in which a number is none from step 2 on."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({"all": self.observation_space})

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return {"all": observation}, info

    def step(self, action):
        observation, *rest = super().step(action)
        return {"all": observation * (np.inf if self.time == 2 else 1)}, *rest


def test_numbers_that_are_none_are_refused_in_dictionaries():
    agent = DAAPPO("MultiInputPolicy", NamedEnv(), **{**TINY, "action_source": "none"})
    with pytest.raises(ValueError, match="non-finite observation at step 2"):
        agent.learn(STEPS)


@pytest.mark.parametrize("end", [None, np.full(3, np.nan)], ids=["none", "nan"])
def test_terminal_observations_are_read_where_an_episode_ended(make, end):
    """Some environments have the key at every step."""

    class Told(CountingEnv):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, {"terminal_observation": end, **info}

    agent = make(DummyVecEnv([Told]))
    assert len(agent.source.transitions) == STEPS


def test_minibatches_carry_the_extra_actions_of_their_states():
    box = spaces.Box(-9, 9, (1,))
    buffer = ManyActionRolloutBuffer(4, box, box, n_envs=2)
    for t in range(4):
        row = np.array([[t], [10 + t]], np.float32)
        x = torch.zeros(2)
        buffer.add(row, row, row[:, 0], np.zeros(2), x, x)
    number = torch.as_tensor(buffer.swap_and_flatten(buffer.observations))  # [8, 1]
    field = number[:, None].expand(8, 3, 1)
    buffer.extra = ExtraActions(field, field[..., 0] + 1, field[..., 0] + 2, field + 3, None)
    seen = []
    for batch in buffer.get(3):
        seen += batch.observations[:, 0].tolist()
        for j in range(3):
            assert torch.equal(batch.extra.actions[:, j], batch.observations)
            assert torch.equal(batch.extra.old_log_prob[:, j], batch.observations[:, 0] + 1)
            assert torch.equal(batch.extra.advantages[:, j], batch.observations[:, 0] + 2)
            assert torch.equal(batch.extra.action_gradient[:, j], batch.observations + 3)
        assert batch.extra.observations is None
    assert sorted(seen) == sorted(number[:, 0].tolist())
    buffer.extra = None
    assert next(iter(buffer.get(3))).extra is None
