"""DreamerTPX on data alone: what the replay holds of a dataset, and learning without acting."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common import callbacks as callbacks_module
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.agents.contract.probes import Trace, assert_same_agents, logged, parameters
from tests.agents.dreamer.tasks import Catch, Room
from totalprop.agents import DreamerTPX
from totalprop.agents.core.datasets import SpacesOnly
from totalprop.agents.dreamer.actions import action_form
from totalprop.agents.dreamer.replay import SequenceReplay
from totalprop.agents.persistence.checkpoint import Checkpoints, TrainingStopped

pytest.importorskip("minari")  # which needs Python 3.11
from tests.datasets import buffer, play, store

NAME = "tests/data-v0"
TINY: dict[str, Any] = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2},
    "sequence_length": 5, "batch_size": 3, "horizon": 3, "gradient_steps": 4, "buffer_size": 500,
    "seed": 0, "device": "cpu",
}  # fmt: skip


class Untouchable(gym.Env):
    """An environment that may be neither stepped nor reset."""

    def __init__(self, of: Any) -> None:
        self.observation_space, self.action_space = of.observation_space, of.action_space

    def reset(self, **_: Any):
        raise AssertionError("the environment was reset")

    def step(self, action: Any):
        raise AssertionError("the environment was stepped")


class Point(gym.Env):
    """Go to 0.5 on a line, and stay there: the reward is 1 minus the distance from it."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x, self.time = float(np.clip(self.x + 0.5 * action[0], -2, 2)), self.time + 1
        return np.array([self.x], np.float32), 1 - abs(self.x - 0.5), False, self.time == 8, {}


# All bounds and actions are binary fractions, so that scaling is exact.
LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([6.0, 1.0], np.float32)
NUMBERED = SimpleNamespace(
    observation_space=spaces.Box(-1e3, 1e3, (3,), np.float32),
    action_space=spaces.Box(LOW, HIGH),
)


def action_at(episode: int, t: int) -> np.ndarray:
    return LOW + (HIGH - LOW) * np.array([t % 9, episode % 5], np.float32) / [8, 4]


def numbered(lengths: list[int], ends: list[bool]) -> Iterator[Any]:
    """Episode e of these lengths observes (e, t, 1), and arrives at t with a reward of 100 e + t.

    `ends` says which of them terminate.
    """
    for e, (length, terminated) in enumerate(zip(lengths, ends)):
        seen = [np.array([e, t, 1], np.float32) for t in range(length + 1)]
        actions = [action_at(e, t).astype(np.float32) for t in range(length)]
        rewards = [100.0 * e + t for t in range(1, length + 1)]
        yield buffer(seen, actions, rewards, terminated=terminated)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    return tmp_path / "datasets"


@pytest.fixture
def dataset():
    return store(NAME, list(numbered([7, 3, 12, 1], [True, False, False, True])), NUMBERED)


def make(of: Any, **changes: Any) -> DreamerTPX:
    return DreamerTPX("DreamerPolicy", Untouchable(of), **{**TINY, **changes})


def entries(replay: SequenceReplay, env: int = 0) -> dict[str, np.ndarray]:
    """All that an environment's ring holds."""
    return replay._rows(env, 0, replay._count[env])


# ------------------------------------------------------------------------------------------------
# what the replay holds
# ------------------------------------------------------------------------------------------------


def assert_numbered(rows: dict[str, np.ndarray], lengths: list[int], ends: list[bool]) -> None:
    """Every entry against what an episode of `numbered` says, one by one."""
    row = iter(range(len(rows["reward"])))
    for e, (length, terminated) in enumerate(zip(lengths, ends)):
        for t in range(length + 1):
            i = next(row)
            assert rows["observation"][i].tolist() == [e, t, 1] and rows["position"][i] == t
            own = 2 * (action_at(e, t - 1) - LOW) / (HIGH - LOW) - 1  # that led here
            assert rows["action"][i].tolist() == (own if t else np.zeros(2)).tolist()
            assert rows["reward"][i] == (100 * e + t if t else 0)
            assert rows["is_terminal"][i] == (terminated and t == length)
    assert next(row, None) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6))
def test_the_replay_holds_every_transition_and_nothing_else(shape):
    lengths, ends = map(list, zip(*shape, strict=True))
    replay = SequenceReplay(200, (3,), np.float32, 2)
    form = action_form(NUMBERED.action_space)
    for one in numbered(lengths, ends):
        replay.append(
            one.observations, form.from_env(one.actions), one.rewards,
            terminated=bool(one.terminations[-1]),
        )  # fmt: skip
    assert_numbered(entries(replay), lengths, ends)


def test_a_dataset_is_in_the_replay_as_it_was_recorded(dataset):
    agent = make(NUMBERED)
    agent.load_dataset(NAME)
    assert_numbered(entries(agent.replay_buffer), [7, 3, 12, 1], [True, False, False, True])
    agent.load_dataset(dataset)  # in place of the old
    assert len(agent.replay_buffer) == 7 + 3 + 12 + 1 + 4


class Acting(gym.Wrapper):
    """Notes the actions that an agent takes, as `play` would have."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.episodes: list[list[Any]] = []

    def reset(self, **kwargs: Any):
        seen, info = self.env.reset(**kwargs)
        self.episodes.append([[seen], [], [], False])
        return seen, info

    def step(self, action: Any):
        seen, reward, terminated, truncated, info = self.env.step(action)
        observations, actions, rewards, _ = self.episodes[-1]
        observations.append(seen), actions.append(action), rewards.append(reward)
        self.episodes[-1][3] = terminated
        return seen, reward, terminated, truncated, info


class Choices(gym.Env):
    """Several choices at once that do not begin at 0; odd episodes terminate, even ones do not."""

    observation_space = spaces.Dict(
        {"box": spaces.Box(-9, 9, (2,), np.float64), "choice": spaces.MultiDiscrete([3, 2])}
    )
    action_space = spaces.MultiDiscrete([3, 2], start=[1, 5])
    number = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.time = self.number + 1, 0
        return self._look(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        is_over, terminates = self.time == 4, bool(self.number % 2)
        reward = float(self.np_random.normal())
        return self._look(), reward, is_over and terminates, is_over and not terminates, {}

    def _look(self):
        box = self.np_random.normal(size=2)
        return {"box": box, "choice": self.np_random.integers(0, [3, 2])}


KINDS = {
    "continuous": Point,
    "choices": Choices,
    "a dictionary, and whole numbers": Room,
    "images that are resized": lambda: Catch((96, 80, 3)),
    "images in grey": lambda: Catch((64, 64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_is_the_one_that_acting_leaves(kind):
    """An agent acts; its steps, stored by Minari and loaded, are the entries it has itself."""
    env = Acting(KINDS[kind]())
    acting = DreamerTPX("DreamerPolicy", env, **TINY, learning_starts=40).learn(30)
    whole = [e for e in env.episodes if e[1]]
    buffers = [buffer(*e[:3], terminated=e[3]) for e in whole]
    made = store(NAME, buffers, env.unwrapped, jpeg_encoding=False)
    agent = make(env)
    agent.load_dataset(made)
    found, expected = entries(agent.replay_buffer), entries(acting.replay_buffer)
    n = sum(len(e[1]) + 1 for e in whole)
    assert len(found["reward"]) == n and n >= 30
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_allclose(found[name], expected[name][:n], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiDiscrete([[3, 2], [4, 5]], start=[[1, 0], [0, 7]]),
        spaces.Box(np.array([-2.0, 0.0]), np.array([6.0, 1.0]), dtype=np.float64),
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Box(np.array([1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float32),  # one is fixed
    ],
)
def test_actions_go_to_the_model_and_back(space):
    space.seed(0)
    actions = np.stack([space.sample() for _ in range(20)])
    form = action_form(space)
    scaled = form.from_env(actions)
    assert scaled.shape == (20, form.size) and np.abs(scaled).max() <= 1 + 1e-6
    np.testing.assert_allclose(form.to_env(scaled), actions, atol=1e-5)


def test_an_action_that_is_no_option_is_a_sentence():
    of = SimpleNamespace(
        observation_space=NUMBERED.observation_space, action_space=spaces.Discrete(3)
    )
    seen = list(np.zeros((3, 3), np.float32))
    made = store(NAME, [buffer(seen, [0, 3], [0.0, 0.0], terminated=True)], of)
    with pytest.raises(ValueError, match=r"action 3 is not in Discrete\(3\)"):
        make(of).load_dataset(made)


def test_actions_beyond_the_bounds_are_clipped_and_counted():
    one = buffer(
        list(np.zeros((4, 3), np.float32)), [[-2, 0], [7, 0.5], [6, 1.5]], [0.0] * 3,
        terminated=True,
    )  # fmt: skip
    agent = make(NUMBERED, sequence_length=3)
    with pytest.warns(UserWarning, match="2 of the dataset's 3 actions lie outside"):
        agent.load_dataset(store(NAME, [one], NUMBERED))
    assert entries(agent.replay_buffer)["action"].tolist() == [[0, 0], [-1, -1], [1, 0], [1, 1]]


def test_episodes_are_spread_over_environments(dataset):
    makers = [lambda: Monitor(Untouchable(NUMBERED))] * 2
    agent = DreamerTPX("DreamerPolicy", DummyVecEnv(makers), **TINY)
    agent.load_dataset(dataset)
    held = [
        entries(agent.replay_buffer, env)["observation"][:, 0].astype(int).tolist()
        for env in range(2)
    ]
    assert held == [[0] * 8 + [3] * 2, [1] * 4 + [2] * 13]
    agent.learn_offline(2)


# ------------------------------------------------------------------------------------------------
# learning
# ------------------------------------------------------------------------------------------------


def test_a_policy_better_than_that_of_the_data_is_learned_from_random_data():
    made = store(NAME, play(Point(), 100), Point())
    returns = [episode.rewards.sum() for episode in made]
    assert np.mean(returns) < 3 and np.percentile(returns, 90) < 6.3
    agent = make(
        Point(), sequence_length=9, batch_size=12, horizon=4, imagination_starts=48, gamma=0.8,
        learning_rate=3e-3, model_learning_rate=5e-3, entropy_scale=0.01, free_nats=0.0,
        buffer_size=2000, gradient_steps=50,
        policy_kwargs={
            "deter": 8, "hidden": 16, "width": 16, "stoch": 3, "vector_std": 0.1, "init_std": 1.0,
        },
    )  # fmt: skip
    agent.load_dataset(made)
    agent.learn_offline(250)
    env = Monitor(Point())
    env.reset(seed=1000)
    mean, _ = evaluate_policy(agent, env, 20)
    assert mean > 6.4  # 7.1 at most; 6.7 measured


def test_the_environment_is_neither_stepped_nor_reset(dataset):
    agent = make(NUMBERED)  # Untouchable
    agent.load_dataset(dataset)
    before = parameters(agent).clone()
    agent.learn_offline(6)
    assert agent.num_timesteps == agent._n_updates == 6
    assert not parameters(agent).equal(before)


def test_a_refused_call_changes_nothing():
    agent = DreamerTPX("DreamerPolicy", Point(), **TINY)
    agent.load_dataset(store(NAME, play(Point(), 5), Point()))
    agent.learn_offline(2)
    for steps, horizon in ((2, 1), (2.5, 3)):
        agent.horizon, before = horizon, agent.horizon
        with pytest.raises(ValueError, match="must be"):
            agent.learn_offline(steps)
        agent.horizon = before
    assert agent.num_timesteps == 2
    assert agent.learn_offline(3e0, reset_num_timesteps=False).num_timesteps == 5
    agent.learn(8, reset_num_timesteps=False)


def test_an_agent_can_be_made_of_the_spaces_alone(dataset):
    agent = DreamerTPX("DreamerPolicy", SpacesOnly(dataset), **TINY)
    agent.load_dataset(dataset)
    agent.learn_offline(1)
    with pytest.raises(RuntimeError, match="no environment to act in"):
        agent.learn(1)


def test_the_updates_are_those_of_learn(tmp_path):
    """From the same replay and random numbers, `learn_offline` ends in the bits of `learn`."""
    acting = DreamerTPX("DreamerPolicy", Point(), **TINY, learning_starts=20, train_freq=10)
    states = []

    def train(*arguments):
        states.append((acting._rng.bit_generator.state, acting._generator.get_state()))
        return DreamerTPX.train(acting, *arguments)

    acting.train = train
    acting.learn(20).save_replay_buffer(tmp_path / "replay.npz")
    offline = make(Point())
    offline.load_replay_buffer(tmp_path / "replay.npz")
    ((offline._rng.bit_generator.state, generator),) = states
    offline._generator.set_state(generator)
    offline.learn_offline(4)
    assert acting._n_updates == 4
    assert parameters(offline).equal(parameters(acting))


def test_a_progress_bar_counts_updates_whatever_the_number_of_environments(monkeypatch):
    pytest.importorskip("rich")
    bars = []

    class Bar(callbacks_module.tqdm):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            bars.append(self)

    monkeypatch.setattr(callbacks_module, "tqdm", Bar)
    agent = DreamerTPX("DreamerPolicy", DummyVecEnv([Point] * 3), **TINY)
    agent.load_dataset(store("tests/point-v0", play(Point(), 9), Point()))
    agent.learn_offline(5, progress_bar=True)
    [bar] = bars
    assert (bar.total, bar.n) == (5, 5)


def test_vectors_are_learned_as_differences_from_the_first_observation(dataset):
    agent = make(NUMBERED)
    agent.load_dataset(dataset)
    agent.learn_offline(1)
    assert agent.policy.model.offset.tolist() == [0, 0, 1]


def test_steps_are_updates_for_callbacks(dataset):
    agent, trace = make(NUMBERED), Trace()
    agent.load_dataset(dataset)
    agent.learn_offline(10, trace)
    four, two = (["rollout+", *["step"] * n, "rollout-"] for n in (4, 2))
    assert trace.events == ["init", "start", *four, *four, *two, "end"]
    assert trace.begun == [0, 4, 8]


def test_a_callback_stops_it_after_an_update(dataset):
    agent = make(NUMBERED)
    agent.load_dataset(dataset)
    agent.learn_offline(10, Trace(stop_at=6))
    assert agent.num_timesteps == agent._n_updates == 6


def test_callbacks_of_stable_baselines3_work(dataset, tmp_path):
    """Among them one that evaluates in an environment of its own."""
    made = store("tests/point-v0", play(Point(), 5), Point())
    agent = make(Point())
    agent.load_dataset(made)
    callbacks = [
        EvalCallback(Monitor(Point()), n_eval_episodes=2, eval_freq=5, verbose=0),
        CheckpointCallback(4, str(tmp_path), name_prefix="agent"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EvalCallback: the environments are of two types
        agent.learn_offline(10, callbacks, progress_bar=False)
    assert sorted(p.name for p in tmp_path.glob("agent*")) == [
        "agent_4_steps.zip", "agent_8_steps.zip",
    ]  # fmt: skip


def test_steps_are_counted_on_unless_they_are_reset(dataset):
    agent = make(NUMBERED)
    agent.load_dataset(dataset)
    agent.learn_offline(3)
    agent.learn_offline(3, reset_num_timesteps=False)
    assert agent.num_timesteps == 6
    agent.learn_offline(2)
    assert agent.num_timesteps == 2 and agent._n_updates == 8


def test_parts_of_rounds_make_the_same_updates(dataset):
    agents = [make(NUMBERED) for _ in range(2)]
    for agent in agents:
        agent.load_dataset(dataset)
    agents[0].learn_offline(9)
    for n in (3, 3, 3):
        agents[1].learn_offline(n, reset_num_timesteps=False)
    assert parameters(agents[0]).equal(parameters(agents[1]))


def test_logs_say_what_the_data_earned_and_nothing_of_acting(dataset):
    agent = make(NUMBERED, gamma=0.5)
    agent.load_dataset(dataset)
    rows = logged(agent)
    agent.learn_offline(8)
    returns = [sum(episode.rewards) for episode in dataset]
    to_go = []
    for episode in dataset:
        for t in range(len(episode)):
            to_go.append(sum(r * 0.5**k for k, r in enumerate(episode.rewards[t:])))
    for values, step in rows:
        assert values["data/ep_rew_mean"] == pytest.approx(np.mean(returns))
        assert values["data/ep_rew_max"] == max(returns)
        assert values["data/return"] == pytest.approx(np.mean(to_go))
        assert values["time/total_timesteps"] == step and np.isfinite(values["train/return"])
        assert not any(name in values for name in ("time/decisions", "time/frames", "time/fps"))
    assert [step for _, step in rows] == [4, 8]


def test_events_of_each_call_are_in_a_folder_of_their_own(dataset, tmp_path):
    agent = make(NUMBERED, tensorboard_log=str(tmp_path / "events"))
    agent.load_dataset(dataset)
    agent.learn_offline(4)
    agent.learn_offline(4, reset_num_timesteps=False)
    agent.learn_offline(4)
    names = sorted(path.name for path in (tmp_path / "events").iterdir())
    assert names == ["DreamerTPX_1", "DreamerTPX_2"]
    assert all(list(path.iterdir()) for path in (tmp_path / "events").iterdir())


@pytest.mark.parametrize(("ends", "is_used"), [([True, False], True), ([False, False], False)])
def test_the_discount_head_is_used_if_an_episode_terminates(ends, is_used):
    made = store(NAME, list(numbered([6, 6], ends)), NUMBERED)
    agent = make(NUMBERED)
    agent.load_dataset(made)
    agent.learn_offline(1)
    assert agent._has_terminated is is_used


def test_learning_goes_on_in_the_environment():
    """The first entry of the new episode follows those of the data."""
    made = store(NAME, play(Point(), 5), Point())
    agent = DreamerTPX("DreamerPolicy", Point(), **TINY, learning_starts=1, train_freq=4)
    agent.load_dataset(made)
    agent.learn_offline(4)
    agent.learn(8)
    assert agent.num_timesteps == 8 and agent._n_updates == 4 + 2 * 4
    positions = entries(agent.replay_buffer)["position"].tolist()
    assert positions == [*range(9)] * 6 + [0]
    agent.learn_offline(2, reset_num_timesteps=False)
    assert agent.num_timesteps == 10


def test_it_learns_from_a_saved_replay_too(dataset, tmp_path):
    agent = make(NUMBERED)
    agent.load_dataset(dataset)
    agent.save_replay_buffer(tmp_path / "replay.npz")
    agent.learn_offline(4)
    other = make(NUMBERED)
    other.load_replay_buffer(tmp_path / "replay.npz")
    other.learn_offline(4)
    assert parameters(agent).equal(parameters(other))


class StopAt(BaseCallback):
    """Asks for the stop that a signal asks for."""

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        super().__init__()
        self.checkpoints, self.step = checkpoints, step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.checkpoints.request_stop()
        return True


def test_a_resumed_run_ends_in_the_same_bits(dataset, tmp_path):
    quiet = make(NUMBERED)
    quiet.load_dataset(dataset)
    quiet.learn_offline(14)
    stopped = make(NUMBERED)
    stopped.load_dataset(dataset)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TrainingStopped):
        stopped.learn_offline(14, [StopAt(checkpoints, 6), checkpoints])
    checkpoints = Checkpoints(tmp_path)
    resumed = checkpoints.load(DreamerTPX, Untouchable(NUMBERED), device="cpu")
    checkpoints.restore(resumed)
    assert resumed.num_timesteps == 8 and resumed.n_cut_episodes == 0
    resumed.learn_offline(14 - 8, checkpoints, reset_num_timesteps=False)
    assert_same_agents(resumed, quiet)


# ------------------------------------------------------------------------------------------------
# errors
# ------------------------------------------------------------------------------------------------


def test_a_dataset_larger_than_the_replay_is_a_sentence_with_the_remedy(dataset):
    agent = make(NUMBERED, buffer_size=26)
    with pytest.raises(ValueError, match=r"27 entries, .* room for 26: pass buffer_size=27, "):
        agent.load_dataset(dataset)
    assert agent.replay_buffer is None
    make(NUMBERED, buffer_size=27).load_dataset(dataset)
    makers = [lambda: Monitor(Untouchable(NUMBERED))] * 2  # each has half of the entries
    agent = DreamerTPX("DreamerPolicy", DummyVecEnv(makers), **{**TINY, "buffer_size": 26})
    with pytest.raises(ValueError, match=r"27 entries, .* room for 26: pass buffer_size=28, "):
        agent.load_dataset(dataset)


def test_an_episode_for_which_no_environment_has_room_is_a_sentence(dataset):
    makers = [lambda: Monitor(Untouchable(NUMBERED))] * 2
    agent = DreamerTPX("DreamerPolicy", DummyVecEnv(makers), **{**TINY, "buffer_size": 28})
    with pytest.raises(ValueError, match="no room for an episode of 13 more: raise buffer_size"):
        agent.load_dataset(dataset)


@pytest.mark.parametrize("of", [Point(), Room()])
def test_other_spaces_are_a_sentence(dataset, of):
    with pytest.raises(ValueError, match=r"observations of the dataset .* those of the agent are"):
        make(of).load_dataset(dataset)


def test_nothing_to_learn_from_is_a_sentence(dataset):
    agent = make(NUMBERED)
    with pytest.raises(ValueError, match="call load_dataset or load_replay_buffer first"):
        agent.learn_offline(1)
    agent = make(NUMBERED, sequence_length=28)
    agent.load_dataset(dataset)
    with pytest.raises(ValueError, match=r"less than a sequence .* 1 x 28 entries"):
        agent.learn_offline(1)


def test_without_an_environment_no_dataset_is_loaded(dataset, tmp_path):
    make(NUMBERED).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="set an environment first"):
        DreamerTPX.load(tmp_path / "agent").load_dataset(dataset)
