"""DreamerTPX beside the contract of tests/agents/contract/: rounds, replay, acting, images.

All on tiny settings. `CountingEnv` makes every stored number predictable; `PixelEnv` is noise.
"""

import json
import types
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
)
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.agents.contract.probes import Memory, Trace, assert_same
from totalprop import estimators
from totalprop.agents import AGENTS, DreamerTPX
from totalprop.agents.dreamer.metrics import Round
from totalprop.agents.dreamer.update import DreamerUpdate, UpdateRecord

LENGTH = 7
LOW, HIGH = np.array([-2.0, 0.0]), np.array([4.0, 1.0])
STARTS, FREQ = 20, 10
TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2},
    "sequence_length": 5,
    "batch_size": 3,
    "horizon": 3,
    "learning_starts": STARTS,
    "train_freq": FREQ,
    "gradient_steps": 1,
    "buffer_size": 500,
    "seed": 0,
    "device": "cpu",
}


class CountingEnv(gym.Env):
    """Observation (episode, time, the action that led here); reward -time on arriving.

    Ends (terminates or truncates) after `length` steps. Nothing is random, actions lie in
    [-2, 4] x [0, 1] and must come in the space's dtype.
    """

    def __init__(self, length=LENGTH, first=0, truncates=False, dtype=np.float32):
        self.observation_space = spaces.Box(-1e3, 1e3, (4,), np.float32)
        self.action_space = spaces.Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)
        self.length, self.episode, self.truncates = length, first, truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0, 0, 0], np.float32), {}

    def step(self, action):
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action)
        self.time += 1
        observation = np.array([self.episode, self.time, *action], np.float32)
        done = self.time >= self.length
        return observation, -self.time, done and not self.truncates, done and self.truncates, {}


class PixelEnv(gym.Env):
    """Noise of 64x64x3 and noisy rewards, truncated after 10 steps; its RNG is gymnasium's."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._look(), {}

    def step(self, action):
        self.time += 1
        return self._look(), float(self.np_random.normal()), False, self.time == 10, {}

    def _look(self):
        return self.np_random.integers(0, 256, (64, 64, 3), np.uint8)


class BrokenEnv(CountingEnv):
    """Observes a non-finite number in step 3, or in the last step."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def step(self, action):
        observation, *rest = super().step(action)
        if self.time == {"observation": 3, "last": LENGTH}[self.where]:
            observation = observation * np.float32(np.nan)
        return observation, *rest


ENVS = {"vectors": CountingEnv, "images": PixelEnv}


def vector(*lengths):
    """Counting environments of these lengths; number i starts its episodes at 100 i."""
    makers = [
        lambda length=length, i=i: Monitor(CountingEnv(length, first=100 * i))
        for i, length in enumerate(lengths)
    ]
    return DummyVecEnv(makers)


def make(env=None, **changes):
    return DreamerTPX("DreamerPolicy", CountingEnv() if env is None else env, **{**TINY, **changes})


def parameters(agent, part=None):
    module = agent.policy if part is None else getattr(agent.policy, part)
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def parameters_of(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def stored(agent, env=0):
    """The replay's entries of one environment, oldest first."""
    replay = agent.replay_buffer
    slots = replay._slots(env)
    arrays = {name: array[env].numpy()[slots] for name, array in replay._arrays.items()}
    return types.SimpleNamespace(time=replay._position[env][slots], **arrays)


def assert_same_training(agent, other):
    """Assert bit-identical parameters, optimisers and replays."""
    assert_same(agent.get_parameters(), other.get_parameters())
    for env in range(agent.n_envs):
        for name, values in vars(stored(agent, env)).items():
            np.testing.assert_array_equal(values, vars(stored(other, env))[name])


def logged(agent):
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory


# The loop


@pytest.mark.parametrize("budget", [0, 1, STARTS - 1, STARTS, STARTS + 1])
def test_any_budget_works(budget):
    agent = make()
    before = parameters(agent)
    agent.learn(budget)
    assert agent.num_timesteps == budget
    assert torch.equal(parameters(agent), before) == (budget < STARTS)
    assert (agent._n_updates == 0) == (budget < STARTS)


@pytest.mark.parametrize("budget", [2, 20, 40, 41, 42])
def test_overshoot_is_less_than_the_number_of_environments(budget):
    agent = make(vector(7, 8, 9)).learn(budget)
    assert 0 <= agent.num_timesteps - budget < 3 and agent.num_timesteps % 3 == 0


def test_counters():
    agent = make(gradient_steps=2).learn(42)
    assert agent._n_updates >= 2 * 3  # rounds at 20, 30 and 40
    assert len(agent.ep_info_buffer) == 6
    assert [info["r"] for info in agent.ep_info_buffer] == [-28.0] * 6
    assert [info["l"] for info in agent.ep_info_buffer] == [7] * 6
    steps = agent._update.model_optimizer.state_dict()["state"][0]["step"]
    assert steps == agent._n_updates


@pytest.mark.parametrize(
    ("ratio", "made"), [(3, [2, 2, 2, 2, 2, 2]), (2, [1, 1, 2, 1, 1, 2]), (0.5, [0, 0, 1, 0, 0, 1])]
)
def test_the_replay_ratio_makes_its_share_of_updates(ratio, made, tmp_path):
    """10 steps of a round times `ratio`, over the 3 x 5 entries of an update; the rest waits."""
    agent, updates = make(replay_ratio=ratio, gradient_steps=99), [0]
    for end in range(STARTS, STARTS + 60, FREQ):
        agent.learn(end - agent.num_timesteps, reset_num_timesteps=False)
        updates.append(agent._n_updates)
        agent.save(tmp_path / "agent")
        agent.save_replay_buffer(tmp_path / "replay.npz")
        agent = DreamerTPX.load(tmp_path / "agent", env=CountingEnv())
        agent.load_replay_buffer(tmp_path / "replay.npz")
    assert np.diff(updates).tolist() == made


def test_the_replay_ratio_counts_steps_of_all_environments():
    """Rounds of 12 steps, as 4 environments make them: 12 x 5 / 15 updates each."""
    agent = make(vector(3, 4, 5, 6), replay_ratio=5).learn(20 + 2 * 12)
    assert agent._n_updates == int(13 * 5 / 15 + 2 * 12 * 5 / 15)


def test_learning_starts_and_train_freq_count_steps_of_all_environments():
    agent = make(vector(7, 8), train_freq=8)
    memory = logged(agent)
    agent.learn(52)
    assert [step for _, step in memory.dumps] == [20, 28, 36, 44, 52]


def test_callbacks_see_the_environments_own_terminal_observation():
    """The replay stores it flat."""

    class Matrix(gym.ObservationWrapper):
        observation_space = spaces.Box(-1e3, 1e3, (2, 2), np.float32)

        def observation(self, observation):
            return observation.reshape(2, 2)

    shapes = []

    class Look(Trace):
        def _on_step(self):
            infos = self.locals["infos"]
            shapes.extend(np.shape(i["terminal_observation"]) for i in infos if len(i) > 1)
            return True

    agent = make(Matrix(CountingEnv())).learn(17, callback=Look())
    assert shapes == [(2, 2)] * 2
    check_entries(stored(agent), episodes(17))


# One training, however it is cut


@pytest.mark.parametrize("cuts", [[30, 20], [13, 4, 16, 17], [25] * 2, [1] * 50], ids=str)
@pytest.mark.parametrize("name", ENVS)
def test_reset_num_timesteps_false_continues_as_if_it_had_not_stopped(name, cuts):
    """Interrupted within an episode and a round, with predictions in between."""
    whole = make(ENVS[name]()).learn(50)
    agent, state = make(ENVS[name]()), None
    for cut in cuts:
        agent.learn(cut, reset_num_timesteps=False)
        for deterministic in (True, False):
            _, state = agent.predict(agent._last_obs, state, deterministic=deterministic)
        agent.predict(np.stack([agent.observation_space.sample()] * 3))
    assert agent.num_timesteps == 50 and agent._n_updates == whole._n_updates == 4
    assert_same_training(agent, whole)


def test_updates_per_step_do_not_depend_on_how_learn_is_cut():
    """Even if a callback stops it, if environments overshoot, and before the first update."""
    agent = make(vector(7, 8), train_freq=8)
    for stop in (4, 10, 24, 30, 38):
        agent.learn(100, Trace(stop_at=stop), reset_num_timesteps=False)
    assert agent.num_timesteps == 38 and agent._n_updates == 3  # at 20, 28 and 36


def test_reset_num_timesteps_true_begins_new_episodes():
    env = CountingEnv()
    agent = make(env).learn(30)
    agent.learn(3)
    assert agent.num_timesteps == 3 and len(agent.replay_buffer) == 30 + 5 + 4
    check_entries(stored(agent), [*episodes(30), (6, 3)])


def test_memory_is_that_of_a_new_episode_after_a_reset(monkeypatch):
    agent = make(learning_starts=1).learn(30)
    seen = spy_on_steps(agent, monkeypatch)
    agent.learn(10)
    (_, state, action, is_first), _ = seen[0]
    assert not state.features.any() and not is_first.any()
    entries = stored(agent)
    begin = 30 + 5  # decisions and resets of the first run; then comes a random action
    assert entries.time[begin] == 0 and len(entries.time) == begin + 12
    np.testing.assert_array_equal(action, entries.action[begin + 1 : begin + 2])


def test_set_env_continues_on_the_new_environment():
    agent = make().learn(30)
    agent.set_env(CountingEnv(first=50))
    agent.learn(10, reset_num_timesteps=False)
    assert agent.num_timesteps == 40
    check_entries(stored(agent), [*episodes(30), (51, 7), (52, 3)])


def test_learning_rate_schedule_follows_the_progress():
    agent = make(learning_rate=lambda progress: 1e-3 * (1 + progress))
    memory = logged(agent)
    agent.learn(40)
    rates = [values["train/learning_rate"] for values, _ in memory.dumps]
    np.testing.assert_allclose(rates, [2e-3, 1.5e-3, 1.25e-3])
    update = agent._update
    for optimizer, rate in (
        (update.actor_optimizer, 1.25e-3),
        (update.critic_optimizer, 1.25e-3),
        (update.model_optimizer, 6e-4),
    ):
        assert [group["lr"] for group in optimizer.param_groups] == [rate]


def test_progress_is_at_most_1_where_a_round_was_cut():
    """The second `learn` counts steps anew, and the round began before its first one."""
    seen = []

    def schedule(progress):
        seen.append(progress)
        return 1e-3

    agent = make(learning_rate=schedule)
    agent.learn(15)
    agent.learn(40)
    assert max(seen) == 1 and min(seen) < 1


# Stored data


def env_action(scaled):
    return LOW + (HIGH - LOW) * (scaled + 1) / 2


def episodes(budget, length=LENGTH, first=1):
    """(number, decisions) of the episodes that a budget begins."""
    whole, rest = divmod(budget, length)
    return [*((first + i, length) for i in range(whole)), (first + whole, rest)]


def check_entries(entries, expected, length=LENGTH, truncates=False):
    """Check every stored number against what the episodes [(number, decisions)] imply."""
    times = np.concatenate([np.arange(decisions + 1) for _, decisions in expected])
    observation = entries.observation.reshape(-1, 4)
    np.testing.assert_array_equal(entries.time, times)
    np.testing.assert_array_equal(observation[:, 1], times)
    numbers = np.concatenate([np.full(decisions + 1, number) for number, decisions in expected])
    np.testing.assert_array_equal(observation[:, 0], numbers)
    np.testing.assert_array_equal(entries.reward, -times)
    later = times > 0
    assert not entries.action[~later].any() and np.abs(entries.action).max() <= 1
    np.testing.assert_allclose(env_action(entries.action)[later], observation[later, 2:], atol=1e-6)
    np.testing.assert_array_equal(entries.is_terminal, (times == length) & (not truncates))


@pytest.mark.parametrize("truncates", [False, True], ids=["terminates", "truncates"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stored_data_random_and_learned_actions_alike(truncates, dtype):
    agent = make(CountingEnv(truncates=truncates, dtype=dtype)).learn(61)
    assert agent._n_updates >= 5
    check_entries(stored(agent), episodes(61), truncates=truncates)


def test_stored_data_of_two_environments():
    agent = make(vector(7, 4)).learn(60)
    check_entries(stored(agent, 0), episodes(30))
    check_entries(stored(agent, 1), episodes(30, 4, 101), length=4)


def test_images_are_stored_as_they_are_channel_first():
    class Seen(PixelEnv):
        seen = []

        def _look(self):
            self.seen.append(super()._look())
            return self.seen[-1]

    agent = make(Seen()).learn(25)
    entries = stored(agent)
    assert entries.observation.dtype == np.uint8 and len(entries.time) == 28 == len(Seen.seen)
    np.testing.assert_array_equal(entries.observation, np.stack(Seen.seen).transpose(0, 3, 1, 2))
    assert not entries.is_terminal.any()  # truncated


@pytest.mark.parametrize("where", ["observation", "last"])
def test_the_error_of_a_non_finite_value_names_the_step(where):
    agent, steps = make(BrokenEnv(where)), {"observation": 3, "last": LENGTH}[where]
    with pytest.raises(ValueError, match=rf"non-finite observation at step {steps}: \["):
        agent.learn(14)
    assert agent.num_timesteps == steps


@pytest.mark.parametrize("length", [1, 3, 4])
def test_episodes_shorter_than_a_sequence_are_learned_from(length):
    """Their sequences of 5 entries hold several episodes, of length + 1 entries each."""
    agent = make(CountingEnv(length=length)).learn(60)
    assert agent._n_updates == make().learn(60)._n_updates > 0
    batch = agent.replay_buffer.sample(200, 5, np.random.default_rng(0))
    assert batch.is_terminal.float().mean() == pytest.approx(1 / (length + 1), abs=0.05)


# Offsets


class ShiftedEnv(gym.Env):
    """A random walk in steps of 2⁻²⁰ around an offset, which float64 can add without rounding."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, offset, dtype=np.float64):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype)
        self.offset = offset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.integers(-(2**20), 2**20, 2), 0
        return self._look(), {}

    def step(self, action):
        self.x = self.x + self.np_random.integers(-(2**18), 2**18, 2)
        self.time += 1
        return self._look(), float(action[0]), self.time == 9, False, {}

    def _look(self):
        return (self.x / 2**20 + self.offset).astype(self.observation_space.dtype)


@pytest.mark.parametrize("offset", [100.0, -1e6, 2.0**30])
def test_an_offset_of_the_observations_changes_nothing(offset, tmp_path):
    """The same actions and parameters, bit for bit; and so after save and load."""
    plain, shifted = make(ShiftedEnv(0.0)).learn(60), make(ShiftedEnv(offset)).learn(60)
    assert torch.equal(parameters(plain), parameters(shifted))
    np.testing.assert_array_equal(stored(plain).action, stored(shifted).action)
    shifted.save(tmp_path / "agent")
    shifted.policy.save(tmp_path / "policy")
    loaded = DreamerTPX.load(tmp_path / "agent", device="cpu")
    policy = type(shifted.policy).load(tmp_path / "policy", device="cpu")
    seen = np.linspace(-1, 1, 64).reshape(32, 2)
    for each in (shifted, loaded, policy):
        actions = each.predict(seen + offset, deterministic=True)[0]
        np.testing.assert_allclose(actions, plain.predict(seen, deterministic=True)[0], atol=1e-5)


def test_float32_observations_may_have_an_offset_too():
    """As far as float32 has digits for it: 2¹⁰ leaves steps of 2⁻¹³."""
    plain, shifted = (make(ShiftedEnv(x, np.float32)).learn(60) for x in (0.0, 2.0**10))
    torch.testing.assert_close(parameters(plain), parameters(shifted), rtol=0, atol=5e-3)


def test_the_offset_is_the_first_observation_and_stays(tmp_path):
    agent = make(ShiftedEnv(1e6)).learn(5)
    first = torch.from_numpy(stored(agent).observation[0])
    assert torch.equal(agent.policy.model.offset, first)
    agent.learn(60, reset_num_timesteps=False).learn(30)
    assert torch.equal(agent.policy.model.offset, first)
    agent.save(tmp_path / "agent")
    other = make(ShiftedEnv(1e6), seed=1, pretrained_world_model=str(tmp_path / "agent"))
    assert torch.equal(other.learn(30).policy.model.offset, first)


def test_a_replay_loads_into_an_agent_with_another_offset(tmp_path):
    """It holds the observations as the environment gave them."""
    make(ShiftedEnv(1e6)).learn(30).save_replay_buffer(tmp_path / "replay.npz")
    agent = make(ShiftedEnv(1e6), seed=1)
    with pytest.raises(ValueError, match="truncate_last_traj must be True"):
        agent.load_replay_buffer(tmp_path / "replay.npz", truncate_last_traj=False)
    agent.load_replay_buffer(tmp_path / "replay.npz", truncate_last_traj=True)
    agent.learn(30)
    seen = agent.policy.model._centred(torch.from_numpy(stored(agent).observation))
    assert 0.1 < seen.abs().max() < 9


# Termination


def test_the_first_termination_switches_the_discount_head_on():
    agent = make(CountingEnv(length=35))
    head, memory = parameters_of(agent.policy.model.discount_head), logged(agent)
    agent.learn(30)
    assert torch.equal(parameters_of(agent.policy.model.discount_head), head)
    agent.learn(30, reset_num_timesteps=False)
    assert not torch.equal(parameters_of(agent.policy.model.discount_head), head)
    losses = {step: values["train/discount_loss"] for values, step in memory.dumps}
    assert {step: loss > 0 for step, loss in losses.items()} == {
        20: False, 30: False, 40: True, 50: True, 60: True
    }  # fmt: skip


def test_before_the_first_termination_the_discount_head_is_as_good_as_absent():
    """Truncations do not count, and what the head would learn is not mixed into the model."""
    agents = [make(CountingEnv(truncates=True), discount_head=x) for x in (True, False)]
    agents[0].policy.load_state_dict(agents[1].policy.state_dict(), strict=False)
    for agent in agents:
        agent.learn(60)
    for name, value in agents[1].policy.state_dict().items():
        assert torch.equal(agents[0].policy.state_dict()[name], value), name


def test_terminations_without_a_discount_head_are_a_warning_once():
    agent = make(discount_head=False)
    with pytest.warns(UserWarning, match="imagines that they go on.*pass discount_head=True"):
        agent.learn(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(30, reset_num_timesteps=False)
        make(CountingEnv(truncates=True), discount_head=False).learn(60)


def test_a_loaded_agent_knows_that_episodes_terminate(tmp_path):
    agent = make().learn(40)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "replay.npz")
    assert agent._update.settings.model.learned_discount
    assert DreamerTPX.load(tmp_path / "agent", device="cpu")._update.settings.model.learned_discount
    other = make(CountingEnv(truncates=True))
    other.load_replay_buffer(tmp_path / "replay.npz")
    assert other.learn(30)._has_terminated


def test_rounds_are_logged_alike_however_the_training_is_cut():
    def dumps(*budgets):
        agent, found = make(), []
        agent.dump_logs = lambda: found.append(agent.num_timesteps)
        for number, budget in enumerate(budgets):
            agent.learn(budget, log_interval=3, reset_num_timesteps=number == 0)
        return found

    assert dumps(110) == dumps(57, 53) == [40, 70, 100]


def test_an_environment_that_returns_its_own_buffer_begins_anew_too():
    """Some vector environments write all observations into the same array."""

    class InPlace(DummyVecEnv):
        def reset(self):
            self.shown = getattr(self, "shown", None)
            if self.shown is None:
                self.shown = super().reset()
            else:
                self.shown[...] = super().reset()
            return self.shown

        def step_wait(self):
            observations, *rest = super().step_wait()
            self.shown[...] = observations
            return self.shown, *rest

    agent = make(InPlace([CountingEnv])).learn(4)
    agent.learn(4)
    positions = agent.replay_buffer._rows(0, 0, 10)["position"]
    np.testing.assert_array_equal(positions, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])


def test_a_replay_is_kept_until_the_file_is_known_to_be_one(tmp_path):
    agent = make().learn(30)
    entries = len(agent.replay_buffer)
    (tmp_path / "text.npz").write_text("no replay")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for name in ("text", "foreign"):
        with pytest.raises(ValueError, match="is not a replay") as error:
            agent.load_replay_buffer(tmp_path / f"{name}.npz")
        assert "pickle" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        agent.load_replay_buffer(tmp_path / "none.npz")
    assert len(agent.replay_buffer) == entries
    agent.save_replay_buffer(tmp_path / "new" / "folder" / "replay.npz")
    agent.load_replay_buffer(tmp_path / "new" / "folder" / "replay.npz")
    assert len(agent.replay_buffer) == entries


# Acting


def spy_on_steps(agent, monkeypatch, step=None):
    """Records ((observations, state, action, is_first), (action, state)) of each step of acting."""
    seen, original = [], step or agent.policy.step

    def spy(observations, state, action, is_first, **kwargs):
        assert kwargs["deterministic"] is False and kwargs["generator"] is agent._generator
        found = original(observations, state, action, is_first, **kwargs)
        seen.append(((observations, state, action, is_first), found))
        return found

    monkeypatch.setattr(agent.policy, "step", spy)
    return seen


def test_random_actions_come_first_and_are_uniform_over_the_space(monkeypatch):
    """n = 400 of each action, seed 0. Kolmogorov-Smirnov: P(distance > 1.95 / sqrt(n)) = 0.001."""
    agent = make(CountingEnv(length=400), learning_starts=400)
    seen = spy_on_steps(agent, monkeypatch)
    agent.learn(400)
    assert not seen
    for column in stored(agent).action[1:401].T:
        ranks = np.arange(1, 401) / 400
        assert np.abs(np.sort(column + 1) / 2 - ranks).max() < 1.95 / 400**0.5
        assert len(np.unique(column)) == 400


def test_random_actions_are_not_the_global_generators():
    """Two agents with the same seed act alike, whatever is drawn elsewhere."""
    first = make().learn(15)
    second = make()
    np.random.rand(3)
    torch.rand(3)
    second.learn(15)
    np.testing.assert_array_equal(stored(first).action, stored(second).action)


@pytest.mark.parametrize("lengths", [(7,), (7, 4)])
def test_policy_acts_after_the_random_steps_with_the_right_memory(lengths, monkeypatch):
    """Without noise, the policy's action is executed and enters the filter at the next step."""
    agent, n = make(vector(*lengths), exploration_noise=0.0), len(lengths)
    seen = spy_on_steps(agent, monkeypatch)
    agent.learn(STARTS + 20 * n)
    assert len(seen) == 20
    done = [stored(agent, env) for env in range(n)]
    first = STARTS // n
    for i, ((observations, state, action, is_first), _) in enumerate(seen):
        for env, length in enumerate(lengths):
            number, time = divmod(first + i, length)
            assert observations[env, :2].tolist() == [100 * env + number + 1, time]
            assert bool(is_first[env]) == (time == 0)
            if time:
                np.testing.assert_array_equal(
                    action[env], done[env].action[(length + 1) * number + time]
                )
        if i:
            for part, expected in zip((*state, action), (*seen[i - 1][1][1], seen[i - 1][1][0])):
                assert torch.equal(part, expected)
    assert not seen[0][0][1].features.any()


def still(observations, state, action, is_first, **kwargs):
    return torch.zeros_like(action), state


def test_exploration_noise_is_gaussian_of_the_given_size(monkeypatch):
    """n = 800 numbers around an action of 0, seed 0: mean and std within 4 standard errors."""
    agent = make(CountingEnv(length=400), learning_starts=1, train_freq=401, exploration_noise=0.2)
    spy_on_steps(agent, monkeypatch, still)
    agent.learn(401)
    noise, n = stored(agent).action[2:401], 2 * 399
    assert abs(noise.mean()) < 4 * 0.2 / n**0.5
    assert abs(noise.std() / 0.2 - 1) < 4 / (2 * n) ** 0.5


def test_noisy_actions_stay_in_the_space(monkeypatch):
    agent = make(learning_starts=1, train_freq=60, exploration_noise=5.0)
    spy_on_steps(agent, monkeypatch, still)
    agent.learn(60)  # the environment checks them
    actions = stored(agent).action
    assert (actions == 1).any() and (actions == -1).any()


# Every estimator


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("name", estimators.names())
def test_every_estimator_learns_from_vectors_and_images(name, env):
    agent = make(ENVS[env](), estimator=name, train_freq=40)
    before = {part: parameters(agent, part) for part in ("model", "actor", "critic")}
    memory = logged(agent)
    agent.learn(200)
    assert agent._n_updates == 5
    for part, old in before.items():
        new = parameters(agent, part)
        assert torch.isfinite(new).all() and not torch.equal(new, old), part
    for values, _ in memory.dumps:
        assert all(np.isfinite(v) for k, v in values.items() if k.startswith(("train/", "k/")))


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize(
    "changes",
    [
        {"baseline": "critic", "estimator": "lr"},
        {"leg": "lax", "estimator": "lr"},
        {"leg": "mvd"},
        {"stop_grad_actor_input": False},
        {"discount_head": False},
        {"discount_weights": False, "free_nats_per_step": True},
        {"entropy_scale": 0.1},
        {"imagination_starts": 3},
        {"bf16": True},
        {"storage": "disk"},
        {"storage": "device"},
        {"gamma": 1.0, "lam": 1.0},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_option_learns(changes, env):
    agent = make(ENVS[env](), **changes)
    before = {part: parameters(agent, part) for part in ("model", "actor", "critic")}
    agent.learn(40)
    for part, old in before.items():
        new = parameters(agent, part)
        assert torch.isfinite(new).all() and not torch.equal(new, old), part


# Reproducibility


def test_same_seed_same_bits_of_images_too():
    first, second, other = (make(PixelEnv(), seed=s).learn(60) for s in (3, 3, 4))
    assert_same_training(first, second)
    for part in ("model", "actor", "critic"):
        assert not torch.equal(parameters(first, part), parameters(other, part))
    assert not np.array_equal(stored(first).action, stored(other).action)


# Callbacks of stable-baselines3


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_evaluating_on_images_does_not_change_what_is_learned(tmp_path):
    callback = EvalCallback(
        Monitor(PixelEnv()),
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        eval_freq=15,
        n_eval_episodes=2,
        deterministic=False,
        verbose=0,
    )
    agent = make(PixelEnv()).learn(60, callback=callback)
    assert_same_training(agent, make(PixelEnv()).learn(60))
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [15, 30, 45, 60]
    assert results["results"].shape == (4, 2)
    assert DreamerTPX.load(tmp_path / "best_model", device="cpu").num_timesteps % 15 == 0


def test_checkpoint_callback_with_the_replay(tmp_path):
    callback = CheckpointCallback(25, str(tmp_path), name_prefix="d", save_replay_buffer=True)
    agent = make().learn(50, callback=callback)
    names = [f"d_{n}_steps.zip" for n in (25, 50)]
    names += [f"d_replay_buffer_{n}_steps.pkl" for n in (25, 50)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    loaded = DreamerTPX.load(tmp_path / "d_25_steps", env=CountingEnv(first=50), device="cpu")
    loaded.load_replay_buffer(tmp_path / "d_replay_buffer_25_steps.pkl")
    assert (loaded.num_timesteps, loaded._n_updates) == (25, 1)
    loaded.learn(10, reset_num_timesteps=False)
    check_entries(stored(loaded), [*episodes(25), (51, 7), (52, 3)])
    np.testing.assert_array_equal(stored(loaded).action[:29], stored(agent).action[:29])


# Files


def walk(agent, steps=4, **kwargs):
    """Actions of a recurrent walk over fixed observations."""
    rng, state, actions = np.random.default_rng(0), None, []
    for _ in range(steps):
        space = agent.observation_space
        observations = rng.uniform(0, 9, (3, *space.shape)).astype(space.dtype)
        action, state = agent.predict(observations, state, deterministic=True)
        actions.append(action)
    return np.stack(actions)


@pytest.mark.parametrize("name", ENVS)
def test_a_loaded_agent_remembers_as_it_did(name, tmp_path):
    agent = make(ENVS[name](), estimator="lr", learning_rate=0.02).learn(40)
    agent.save(tmp_path / "agent")
    loaded = DreamerTPX.load(tmp_path / "agent", device="cpu")
    np.testing.assert_array_equal(walk(loaded), walk(agent))
    assert loaded.num_timesteps == 40 and loaded._n_updates == agent._n_updates
    for key in ("estimator", "horizon", "seed", "learning_rate", "policy_kwargs", "buffer_size"):
        assert getattr(loaded, key) == getattr(agent, key), key


def test_optimisers_are_saved_the_next_update_is_the_same(tmp_path):
    agent = make().learn(40)
    agent.save(tmp_path / "agent")
    loaded = DreamerTPX.load(tmp_path / "agent", device="cpu")
    parts = {f"_update.{name}_optimizer" for name in ("model", "actor", "critic")}
    assert set(loaded.get_parameters()) == {"policy", *parts}
    batch = agent.replay_buffer.sample(3, 5, np.random.default_rng(0))
    for each in (agent, loaded):
        each._update(batch, torch.Generator().manual_seed(0))
    assert torch.equal(parameters(agent), parameters(loaded))


def test_replay_is_neither_in_the_file_nor_allocated_by_load(tmp_path):
    """10⁹ images would take 12 TB."""
    agent = make(PixelEnv()).learn(30)
    agent.buffer_size = 10**9
    agent.save(tmp_path / "agent")
    assert agent.replay_buffer.bytes > 6e6 > 10 * (tmp_path / "agent.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "agent.zip") as file:
        kept = json.loads(file.read("data"))
    assert not {"replay_buffer", "_update", "_memory", "_generator", "policy"} & set(kept)
    loaded = DreamerTPX.load(tmp_path / "agent", env=PixelEnv(), device="cpu")
    assert loaded.replay_buffer is None and loaded.buffer_size == 10**9
    with pytest.raises(MemoryError, match="smaller buffer_size"):
        loaded.learn(1)


@pytest.mark.parametrize(
    ("lengths", "freq", "waits"),
    [((7,), 3, 1), ((7,), 5, 0), ((7, 7, 7), 3, 3), ((7, 4, 4), 6, 1), ((3, 7), 2, 3)],
)
def test_learning_goes_on_after_load_without_the_replay(lengths, freq, waits, tmp_path):
    """Rounds wait for a window: 5 entries are a reset and 4 steps of an environment."""
    settings = {"train_freq": freq, "learning_starts": 30}
    make(vector(*lengths), **settings).learn(30).save(tmp_path / "agent")
    loaded = DreamerTPX.load(tmp_path / "agent", env=vector(*lengths), device="cpu")
    before, start = loaded._n_updates, loaded.num_timesteps
    for rounds in range(1, 6):
        loaded.learn(freq, reset_num_timesteps=False)
        assert loaded._n_updates - before == max(0, rounds - waits)
    assert loaded.num_timesteps == start + 5 * freq


def test_rounds_that_are_due_before_a_window_is_there_wait():
    """The first window exists after 4 steps, so with learning_starts=1 rounds 1, 2 and 3 wait."""
    agent = make(learning_starts=1, train_freq=1).learn(3)
    assert agent._n_updates == 0
    assert agent.learn(2, reset_num_timesteps=False)._n_updates == 2


@pytest.mark.parametrize("name", ENVS)
def test_replay_round_trip_and_learning_on(name, tmp_path):
    agent = make(ENVS[name]()).learn(30)
    agent.save_replay_buffer(tmp_path / "replay.npz")
    other = make(ENVS[name](), seed=1)
    other.load_replay_buffer(tmp_path / "replay.npz")
    n = len(stored(agent).time)
    for key, values in vars(stored(agent)).items():
        np.testing.assert_array_equal(vars(stored(other))[key], values)
    batches = [x.replay_buffer.sample(4, 5, np.random.default_rng(0)) for x in (agent, other)]
    for mine, theirs in zip(*batches, strict=True):
        assert torch.equal(mine, theirs)
    other.learn(30)
    assert other._n_updates >= 2 and stored(other).time[n] == 0


def test_replay_loaded_during_training_begins_a_new_episode(tmp_path):
    """The running episode does not continue the last one in the file."""
    agent = make().learn(30)
    agent.save_replay_buffer(tmp_path / "replay.npz")
    agent.learn(3, reset_num_timesteps=False)
    agent.load_replay_buffer(tmp_path / "replay.npz")
    agent.learn(4, reset_num_timesteps=False)
    assert agent.num_timesteps == 37
    check_entries(stored(agent), [*episodes(30), (6, 4)])


def test_replay_files_that_cannot_be(tmp_path):
    agent = make()
    with pytest.raises(ValueError, match="no replay yet"):
        agent.save_replay_buffer(tmp_path / "replay.npz")
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="set an environment first"):
        DreamerTPX.load(tmp_path / "agent", device="cpu").load_replay_buffer(tmp_path / "r.npz")
    make(PixelEnv()).learn(1).save_replay_buffer(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="this one is of"):
        agent.load_replay_buffer(tmp_path / "images.npz")


# Logging

SCALARS = {
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/decisions", "time/frames", "time/fps",
    "time/total_timesteps", "time/updates_per_second", "train/actor_gradient_norm",
    "train/actor_loss", "train/critic_gradient_norm", "train/critic_loss", "train/discount_loss",
    "train/entropy", "train/gradient_snr", "train/k", "train/kl", "train/learning_rate",
    "train/model_gradient_norm", "train/model_loss", "train/n_updates", "train/observation_loss",
    "train/return", "train/reward_loss", "train/value", "k/step_01", "k/step_02", "k/step_03",
    "k/coordinate_00", "k/coordinate_01", "k/coordinate_02", "k/coordinate_03",
    "train/z", "train/node_snr", "train/node_snr_rp", "train/node_snr_lr",
}  # fmt: skip


def test_scalars_are_in_progress_csv(tmp_path):
    agent = make(gradient_steps=2)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(40)
    names, *rows = ((tmp_path / "progress.csv").read_text().strip()).splitlines()
    assert set(names.split(",")) >= SCALARS
    assert "z/step_01" not in names and "snr/step_01" not in names
    table = [dict(zip(names.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    assert [row["time/decisions"] for row in table] == [20, 30, 40]
    assert [row["train/n_updates"] for row in table] == [2, 4, 6]
    for row in table:
        assert all(np.isfinite(row[name]) for name in SCALARS)
        assert 0 <= row["train/k"] <= 1 and row["time/updates_per_second"] > 0
        assert row["rollout/ep_rew_mean"] == -28 and row["rollout/ep_len_mean"] == 7
        for kind, n in (("step", 3), ("coordinate", 4)):
            values = [value for name, value in row.items() if name.startswith(f"k/{kind}_")]
            assert len(values) == n and np.mean(values) == pytest.approx(row["train/k"], abs=1e-5)


@pytest.mark.parametrize(("estimator", "k"), [("rp", 0.0), ("lr", 1.0)])
def test_logged_k_is_the_estimators(estimator, k):
    agent = make(estimator=estimator)
    memory = logged(agent)
    agent.learn(20)
    values = memory.dumps[0][0]
    assert {v for name, v in values.items() if name.startswith("k/")} == {values["train/k"]} == {k}


def test_a_round_logs_means_and_the_gradients_signal_to_noise_ratio():
    """Gradients (1, 2) and (3, 2): variance 2 + 0, squared mean 8 less the mean's variance 1."""
    agent = make()
    memory = logged(agent)
    with Round(agent) as log:
        for a, b in ((1.0, 0.0), (3.0, 0.5)):
            gradient = [torch.tensor([a]), torch.tensor([2.0])]
            k = torch.tensor([[b, 1.0], [b, 0.0]])
            scalars = {"kl": torch.tensor(a), "skipped_steps": torch.tensor(1.0)}
            log.add(UpdateRecord(scalars, gradient, k))
    agent.logger.dump()
    values = memory.dumps[0][0]
    assert values["train/gradient_snr"] == pytest.approx(7 / 2)
    assert values["train/kl"] == 2 and values["train/k"] == pytest.approx(0.375)
    assert values["train/skipped_steps"] == 2  # a count
    assert [values[f"k/step_{t}"] for t in ("01", "02")] == pytest.approx([0.625, 0.125])
    assert [values[f"k/coordinate_{d}"] for d in ("00", "01")] == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize("all_skipped", [False, True])
def test_a_skipped_update_is_counted_and_does_not_make_the_round_nan(all_skipped):
    agent = make()
    memory = logged(agent)
    nan = torch.tensor(torch.nan)
    with Round(agent, skips=True) as log:
        if not all_skipped:
            scalars = {"kl": torch.tensor(3.0), "skipped_steps": torch.tensor(0.0)}
            log.add(UpdateRecord(scalars, [torch.ones(1)], torch.zeros(1, 1)))
        scalars = {"kl": nan, "skipped_steps": torch.tensor(2.0)}
        log.add(UpdateRecord(scalars, [nan.reshape(1)], nan.reshape(1, 1)))
    agent.logger.dump()
    values = memory.dumps[0][0]
    assert values["train/skipped_steps"] == 2 and values["time/updates_per_second"] > 0
    if not all_skipped:
        assert values["train/kl"] == 3 and values["train/k"] == 0


def test_a_round_logs_z_and_ratios_of_the_updates_that_measured_them():
    """Two updates of two steps; at the second step nothing could be measured of RP."""
    agent = make()
    memory = logged(agent)
    scalars, gradient, k = {}, [torch.zeros(1)], torch.zeros(2, 1)
    first = [[[8.0, 2], [3, 1], [5, 1], [0, 1]], [[0, 0], [-1, 1], [0, 0], [2, 1]]]
    second = [[[24.0, 2], [5, 1], [6, 1], [1, 1]], [[0, 0], [3, 1], [0, 0], [4, 1]]]
    with Round(agent) as log:
        for gauge in (torch.tensor(first), None, torch.tensor(second)):
            log.add(UpdateRecord(scalars, gradient, k, gauge=gauge))
    assert agent.logger.name_to_excluded["z/step_01"] == ("stdout", "log", "json", "csv")
    agent.logger.dump()
    values = memory.dumps[0][0]
    found = {x: v for x, v in values.items() if "snr" in x or x.split("/")[1] == "z" or x[0] == "z"}
    del found["train/gradient_snr"]
    assert found == pytest.approx({
        "train/z": 8**0.5, "train/node_snr": 2.5, "train/node_snr_rp": 5.5,
        "train/node_snr_lr": 1.75, "z/step_01": 8**0.5, "snr/step_01": 4.0, "snr/step_02": 1.0,
    })  # fmt: skip


def test_the_first_and_every_tenth_update_of_a_round_measure(monkeypatch):
    measured = []
    original = DreamerUpdate.__call__

    def spy(self, *args, measure):
        measured.append(measure)
        return original(self, *args, measure=measure)

    monkeypatch.setattr(DreamerUpdate, "__call__", spy)
    make(gradient_steps=12).learn(40)
    one = [i % 10 == 0 for i in range(12)]
    assert measured == one * (len(measured) // 12) and len(measured) >= 24


@pytest.mark.parametrize("n_envs", [1, 2])
def test_frames_are_decisions_times_the_action_repeat(n_envs):
    class Repeating(CountingEnv):
        action_repeat = 2

    found = []
    for env in (Repeating, CountingEnv):
        agent = make(DummyVecEnv([env] * n_envs))
        memory = logged(agent)
        agent.learn(20)
        values = memory.dumps[-1][0]
        found.append((values["time/decisions"], values["time/frames"]))
    assert found == [(20, 40), (20, 20)]


def test_environments_in_other_processes_are_asked_before_they_are_read():
    """A worker of SubprocVecEnv dies when a missing attribute is read."""

    class Fragile(DummyVecEnv):
        def has_attr(self, attr_name):
            return all(hasattr(env, attr_name) for env in self.envs)

        def get_attr(self, attr_name, indices=None):
            if not self.has_attr(attr_name):
                raise EOFError
            return super().get_attr(attr_name, indices)

    assert make(Fragile([CountingEnv] * 2)).learn(40).num_timesteps == 40


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [20, 30]), (1e9, [20])])
def test_figure_and_scalars_reach_tensorboard(tmp_path, monkeypatch, seconds, steps):
    monkeypatch.setattr("totalprop.agents.dreamer.agent.FIGURE_SECONDS", seconds)
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    agent = make(tensorboard_log=str(tmp_path)).learn(30)
    agent.logger.close()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "DreamerTPX_1"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["figures/k", "figures/z_and_snr"]
    assert {"train/kl", "k/step_01", "k/coordinate_03", "time/frames"} <= set(tags["scalars"])
    assert {"z/step_01", "z/step_03", "snr/step_03", "train/z"} <= set(tags["scalars"])
    for name in tags["images"]:
        assert [e.step for e in events.Images(name)] == steps
    assert [e.step for e in events.Scalars("train/kl")] == [20, 30]


def test_verbose_says_that_no_update_was_made_and_when_one_is_due(capsys):
    agent = make(verbose=1).learn(STARTS - 1)
    said = capsys.readouterr().out
    assert f"no update was made in these 19 steps: the next is due after step {STARTS} " in said
    agent.learn(1, reset_num_timesteps=False)
    assert "no update" not in capsys.readouterr().out
    agent.learn(3, reset_num_timesteps=False)
    assert "in these 3 steps: the next is due after step 30 " in capsys.readouterr().out
    agent.learn(0, reset_num_timesteps=False)
    make(verbose=0).learn(STARTS - 1)
    assert "no update" not in capsys.readouterr().out


def test_verbose_says_that_the_ratio_has_to_ask_for_an_update(capsys):
    make(verbose=1, replay_ratio=0.01).learn(STARTS + 5)
    assert ", and replay_ratio=0.01 asks for one\n" in capsys.readouterr().out


def test_verbose_says_how_large_the_replay_is(capsys):
    make(verbose=1).learn(30)
    out = capsys.readouterr().out
    assert "train/" in out and "replay: 500 entries" in out and "step_01" not in out


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["ram", "device"])
def test_the_recommended_preset_learns_on_a_gpu_as_one_graph(storage, tmp_path):
    """Its first episode ends in between, which switches the discount head on: a new recording."""
    preset = AGENTS["dreamer"].presets["recommended"]
    kwargs = {**preset["policy_kwargs"], **TINY["policy_kwargs"]}
    changes = {"replay_ratio": 0, "gradient_steps": 5, "imagination_starts": 7}
    gpu = {"device": "cuda", "cuda_graph": True, "storage": storage}
    settings = {**preset, **TINY, **changes, **gpu, "policy_kwargs": kwargs}
    agent = DreamerTPX("DreamerPolicy", CountingEnv(length=40), **settings).learn(100)
    assert agent._update._step._graph is not None and agent._has_terminated
    agent.save(tmp_path / "model")
    agent.save_replay_buffer(tmp_path / "replay.npz")
    loaded = DreamerTPX.load(tmp_path / "model", CountingEnv(length=40), device="cuda")
    loaded.load_replay_buffer(tmp_path / "replay.npz")
    assert loaded.learn(60, reset_num_timesteps=False)._n_updates == agent._n_updates + 30
    moved = DreamerTPX.load(tmp_path / "model", device="cpu")
    observation = np.array([0, 3, 0.5, 0.5], np.float32)
    actions = [other.predict(observation, deterministic=True)[0] for other in (agent, moved)]
    np.testing.assert_allclose(*actions, rtol=1e-3, atol=1e-4)
