"""`Evaluation`: when it evaluates, what it writes, and that learning is the same without it."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from totalprop.agents import PIPPS, DreamerTPX
from totalprop.agents.core import evaluation as evaluation_module
from totalprop.agents.core.evaluation import Episodes, Evaluation, evaluate
from totalprop.agents.dreamer.open_loop import OpenLoopPictures

LENGTH = 7
TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4},
    "sequence_length": 5,
    "batch_size": 3,
    "horizon": 3,
    "learning_starts": 20,
    "train_freq": 10,
    "gradient_steps": 1,
    "buffer_size": 500,
    "seed": 0,
    "device": "cpu",
}


class CountingEnv(gym.Env):
    """Observation (episode, time); the reward of step 1 is 1, of later steps the first action."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = spaces.Box(-1e3, 1e3, (2,), np.float32)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        reward = 1.0 if self.time == 1 else float(action[0])
        observation = np.array([self.episode, self.time], np.float32)
        return observation, reward, self.time == LENGTH, False, {}


def make(**changes):
    return DreamerTPX("DreamerPolicy", CountingEnv(), **{**TINY, **changes})


def evaluation(**changes):
    env = DummyVecEnv([lambda: Monitor(CountingEnv())])
    return Evaluation(env, **{"n_episodes": 2, **changes})


@pytest.mark.parametrize(
    ("every", "budget", "expected"),
    [
        (0, 45, [20, 30, 40]),  # after each round of updates
        (0, 40, [20, 30, 40]),
        (15, 50, [20, 40, 50]),  # at the first round that is late enough
        (20, 50, [20, 40, 50]),
        (1000, 45, [45]),
        (0, 10, [10]),  # nothing was learned: the first policy is the final one
    ],
)
def test_policy_is_evaluated_when_due_and_at_the_end(every, budget, expected):
    callback = evaluation(every=every)
    make().learn(budget, callback=callback)
    assert callback.timesteps == expected
    assert np.shape(callback.returns) == (len(expected), 2)


def test_pipps_is_evaluated_after_each_policy_search():
    callback = evaluation()
    changes = {"n_particles": 10, "horizon": LENGTH, "gradient_steps": 1, "gp_evaluations": 2}
    agent = PIPPS("LinearPolicy", CountingEnv(), random_trials=2, seed=0, device="cpu", **changes)
    agent.learn(4 * LENGTH, callback=callback)
    assert callback.timesteps == [14, 21, 28]


def test_final_policy_of_a_second_learn_is_evaluated_too():
    """It ends at the same step as the first, with another policy."""
    callback, agent = evaluation(every=1000), make()
    for _ in range(2):
        agent.learn(40, callback=callback)
    assert callback.timesteps == [40, 40]
    assert callback.returns[0] != callback.returns[1]
    agent.learn(5, callback=callback)  # learns nothing
    assert callback.timesteps == [40, 40]


def test_file_is_rewritten_after_every_evaluation(tmp_path):
    path = tmp_path / "evaluations.json"
    callback = evaluation(path=path)
    found = []
    look = ConvertCallback(lambda *_: found.append(path.exists()) or True)
    make().learn(45, callback=[callback, look])
    assert found == [False] * 20 + [True] * 25
    record = json.loads(path.read_text())
    assert record == {"timesteps": [20, 30, 40], "returns": callback.returns}
    assert all(type(x) is float for row in record["returns"] for x in row)


def test_a_new_best_agent_is_handed_over_and_no_other(monkeypatch):
    means = iter([1.0, 3.0, 3.0, 2.0, 4.0])
    found = []
    callback = evaluation(on_new_best=lambda agent: found.append(agent.num_timesteps))

    def evaluate(*args, **kwargs):
        return Episodes([value := next(means), value], [LENGTH, LENGTH], 0)

    monkeypatch.setattr(evaluation_module, "evaluate", evaluate)
    agent = make().learn(40, callback=callback)  # evaluated at 20, 30, 40
    again = evaluation(on_new_best=callback.on_new_best)
    again.load_state_dict(callback.state_dict())
    agent.learn(20, callback=again, reset_num_timesteps=False)  # at 50, 60
    assert again.timesteps == [20, 30, 40, 50, 60] and found == [20, 30, 60]


def test_a_resumed_run_is_evaluated_when_it_would_have_been():
    first, again = evaluation(every=20), evaluation(every=20)
    agent = make().learn(40, callback=first)
    again.load_state_dict(first.state_dict())
    agent.learn(40, callback=again, reset_num_timesteps=False)
    assert again.timesteps == [20, 40, 60, 80]  # not at 50, the next round


def test_returns_are_those_of_the_deterministic_policy():
    callback, agent = evaluation(every=1000, n_episodes=1), make()
    agent.learn(45, callback=callback)
    expected, state = 1.0, None
    for time in range(LENGTH):
        action, state = agent.predict(np.array([1, time], np.float32), state, deterministic=True)
        expected += float(action[0]) * (time > 0)
    assert callback.returns == [[pytest.approx(expected, abs=1e-5)]]


def test_learning_is_the_same_with_and_without():
    found = []
    for callback in (None, evaluation(), evaluation(every=20, n_episodes=5)):
        agent = make().learn(60, callback=callback)
        found.append(torch.nn.utils.parameters_to_vector(agent.policy.parameters()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_result_is_logged_and_printed(capsys):
    agent = make(verbose=1)
    callback = evaluation(verbose=1)
    agent.learn(30, callback=callback)
    out = capsys.readouterr().out
    assert "eval/" in out and "mean_reward" in out
    assert "    20 real steps: return " in out and "    30 real steps: return " in out


@pytest.mark.parametrize(("quantity", "sign"), [("return", 1), ("cost", -1)])
def test_the_quantity_printed_is_the_one_asked_for(quantity, sign, capsys):
    callback = evaluation(verbose=1, quantity=quantity)
    make().learn(30, callback=callback)
    expected = f"{quantity} {sign * np.mean(callback.returns[0]):8.2f} ±"
    assert f"    20 real steps: {expected}" in capsys.readouterr().out


def test_a_second_learn_is_evaluated_before_its_end_too():
    """It counts steps from 0, below the step of the first one's last evaluation."""
    callback, agent = evaluation(every=15), make()
    for _ in range(2):
        agent.learn(50, callback=callback)
    assert callback.timesteps == [20, 40, 50, 20, 40, 50]


def test_pictures_come_again_in_a_second_learn_and_wait_for_a_sequence(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "totalprop.agents.dreamer.open_loop.picture",
        lambda agent: drawn.append(agent.num_timesteps),
    )
    callback, agent = OpenLoopPictures(20), make()
    for _ in range(2):
        agent.learn(50, callback=callback)
    assert drawn == [20, 40, 0, 20, 40]
    agent.save(tmp_path / "model")
    loaded, first = DreamerTPX.load(tmp_path / "model", env=CountingEnv()), len(drawn)
    loaded.learn(30, callback=OpenLoopPictures(1), reset_num_timesteps=False)
    assert drawn[first:] == [60, 70]  # at 50 no sequence was stored


class EndlessEnv(CountingEnv):
    """Pays 1 a step; episodes of number 1, 4, 7, ... end after LENGTH steps, others never."""

    def step(self, action):
        observation, *_ = super().step(action)
        return observation, 1.0, self.time == LENGTH and self.episode % 3 == 1, False, {}


class Zero:
    """A policy."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros((len(observation), 1), np.float32), state


@pytest.mark.parametrize("wrap", [Monitor, lambda env: env])
def test_episodes_without_an_end_are_cut_and_counted(wrap):
    env = DummyVecEnv([lambda: wrap(EndlessEnv())] * 2)
    found = evaluate(Zero(), env, 5, max_steps=20)
    # Both play numbers 1 (ends) and 2 (cut), then a reset of both begins number 3 (cut).
    assert sorted(found.returns) == [7, 7, 20, 20, 20] and found.n_cut == 3
    assert found.lengths == [int(r) for r in found.returns]
    assert "3 of 5 evaluation episodes had not ended after 20 steps" in found.describe_cut(20)


def test_a_cut_return_is_of_raw_rewards():
    env = VecNormalize(DummyVecEnv([lambda: Monitor(EndlessEnv())]))
    assert evaluate(Zero(), env, 2, max_steps=20).returns == [7, 20]


def test_where_all_episodes_end_it_is_stable_baselines3s_evaluation():
    """The end of a life is no end of an episode: only the Monitor's ends count."""

    class Lives(gym.Wrapper):
        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            return observation, reward, terminated or self.unwrapped.time == 3, truncated, info

        def reset(self, **kwargs):
            env = self.unwrapped
            if 0 < getattr(env, "time", 0) < LENGTH:  # the episode goes on
                return np.array([env.episode, env.time], np.float32), {}
            return self.env.reset(**kwargs)

    agent = make()
    for wrap in (Monitor, lambda env: Lives(Monitor(env)), lambda env: env):
        envs = [DummyVecEnv([lambda wrap=wrap: wrap(CountingEnv())] * 3) for _ in range(2)]
        theirs = evaluate_policy(agent, envs[0], 7, return_episode_rewards=True, warn=False)
        ours = evaluate(agent, envs[1], 7)
        assert (ours.returns, ours.lengths, ours.n_cut) == (*theirs, 0)


def test_a_cut_evaluation_says_so_once(capsys):
    env = DummyVecEnv([lambda: Monitor(EndlessEnv())])
    callback = Evaluation(env, n_episodes=2, max_steps=10)
    make().learn(45, callback=callback)
    assert np.shape(callback.returns) == (3, 2) and max(max(r) for r in callback.returns) == 10
    assert capsys.readouterr().out.count("had not ended after 10 steps and were cut") == 1
