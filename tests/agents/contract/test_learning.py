"""`learn`: how many steps it takes, in which order things happen, and how it is interrupted."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from tests.agents.contract.conftest import TRAINED
from tests.agents.contract.environments import (
    HIGH,
    LENGTH,
    LOW,
    RETURN,
    CountingEnv,
    MeasuredEnv,
    NoisyEnv,
    OtherSpaces,
    ReusingEnv,
    vector,
)
from tests.agents.contract.probes import (
    Trace,
    assert_same_agents,
    logged,
    parameters,
)
from tests.agents.contract.runs import takes_vec_normalize
from totalprop.agents.core.checked_env import CheckedEnv

# Steps


@pytest.mark.parametrize("lengths", [(7,), (7, 4, 5)], ids=["1 env", "3 envs"])
@pytest.mark.parametrize("budget", [0, 1, 7, 15, 21])
def test_learn_returns_self_after_the_rollout_that_reaches_the_budget(make, lengths, budget):
    trace, agent = Trace(), make(vector(*lengths))
    assert agent.learn(budget, callback=trace) is agent
    assert agent.num_timesteps >= budget and trace.begun == sorted(set(trace.begun))
    assert all(begun < budget for begun in trace.begun)
    done = [env.unwrapped.steps for env in agent.env.envs]
    assert set(done) == {trace.events.count("step")}
    assert agent.num_timesteps == sum(done)


def test_nothing_is_learned_from_no_steps(make):
    agent = make()
    before = parameters(agent)
    agent.learn(0)
    assert torch.equal(parameters(agent), before) and agent._n_updates == 0


def test_parameters_move_and_stay_finite(make, trained):
    assert torch.isfinite(parameters(trained)).all()
    assert not torch.equal(parameters(trained), parameters(make()))
    assert trained._n_updates > 0


def test_episodes_are_counted(trained):
    assert [info["r"] for info in trained.ep_info_buffer] == [RETURN] * 4
    assert [info["l"] for info in trained.ep_info_buffer] == [LENGTH] * 4


def test_learn_counts_anew_or_on(make):
    env = CountingEnv()
    agent = make(env).learn(14)
    updates, episode = agent._n_updates, env.episode
    agent.learn(7, reset_num_timesteps=False)
    assert agent.num_timesteps == 21 and agent._n_updates > updates and env.steps == 21
    assert env.episode == episode + 1  # one more, in 7 steps
    agent.learn(7)
    assert agent.num_timesteps == 7 and env.steps == 28


def test_an_episode_that_runs_is_continued_or_begun_anew(make):
    env = CountingEnv()
    agent = make(env).learn(100, callback=Trace(stop_at=10))
    agent.learn(100, callback=Trace(stop_at=12), reset_num_timesteps=False)
    assert env.time == 5 and env.episode == 2
    agent.learn(100, callback=Trace(stop_at=2))
    assert env.time == 2 and env.episode == 3


def test_continuing_is_as_if_it_had_not_stopped(make, trained):
    """Also with predictions between, which draw nothing that learning would have drawn."""
    agent = make()
    for _ in range(2):
        agent.learn(14, reset_num_timesteps=False)
        agent.predict(np.ones((3, 4), np.float32), deterministic=True)
    assert_same_agents(agent, trained)


# Callbacks


def test_callbacks_see_the_step_under_stable_baselines3s_names(make):
    """`new_obs` is what the environments returned, after their reset where an episode ended.

    `actions` are in the environments' units; DAAPPO's, like PPO's, before they are clipped.
    """
    seen = []

    def look(variables, _):
        names = ("new_obs", "rewards", "dones", "infos", "actions")
        kept = {name: variables[name] for name in names}
        seen.append(copy.deepcopy(kept))
        return True

    make().learn(14, callback=look)
    assert len(seen) == 14
    for i, step in enumerate(seen):
        episode, time, *_ = step["new_obs"][0]
        assert (episode, time) == (1 + (i + 1) // LENGTH, (i + 1) % LENGTH)
        assert step["rewards"].tolist() == [-1 - i % LENGTH]
        assert step["dones"].tolist() == [time == 0] and len(step["infos"]) == 1
        led_to = step["infos"][0].get("terminal_observation", step["new_obs"][0])
        np.testing.assert_allclose(led_to[2:], np.clip(step["actions"][0], LOW, HIGH), rtol=1e-6)


def test_events_come_in_stable_baselines3s_order(make):
    trace = Trace()
    agent = make().learn(21, callback=trace)
    assert trace.events[:2] == ["init", "start"] and trace.events[-1] == "end"
    rollouts = " ".join(trace.events[2:-1]).split("rollout+")[1:]
    steps = [rollout.split() for rollout in rollouts]
    assert all(set(events[:-1]) == {"step"} and events[-1] == "rollout-" for events in steps)
    lengths = [len(events) - 1 for events in steps]
    assert np.cumsum([0, *lengths]).tolist() == [*trace.begun, agent.num_timesteps]
    for once in ("init", "start", "end"):
        assert trace.events.count(once) == 1


@pytest.mark.parametrize("stop", [False, np.bool_(False), torch.tensor(False)], ids=repr)
def test_a_callback_stops_and_learning_can_be_resumed(make, stop):
    trace, env = Trace(stop_at=17, stop_with=stop), CountingEnv()
    agent = make(env)
    assert agent.learn(100, callback=trace) is agent
    assert agent.num_timesteps == env.steps == 17
    assert trace.events.count("step") == 17 and trace.events[-1] == "end"
    before = parameters(agent)
    agent.learn(11, reset_num_timesteps=False)
    assert agent.num_timesteps >= 28 and not torch.equal(parameters(agent), before)


def test_function_and_list_callbacks(make):
    seen, traces = [], [Trace(), Trace()]
    agent = make()
    agent.learn(14, callback=lambda values, _: bool(seen.append(values["dones"][0])) or True)
    assert seen == [*[False] * 6, True] * 2
    agent.learn(7, callback=traces)
    assert [trace.events.count("step") for trace in traces] == [7, 7]
    agent.learn(100, callback=lambda values, _: False)
    assert agent.num_timesteps == 1


def test_callbacks_see_the_locals_that_others_rely_on(make):
    needed = {"dones", "infos", "rewards", "actions", "self", "total_timesteps", "tb_log_name"}
    episodes = []

    class Look(Trace):
        def _on_step(self):
            assert needed <= set(self.locals) and self.locals["self"] is self.model
            assert self.n_calls == self.num_timesteps == self.model.num_timesteps
            episodes.extend(i["episode"]["r"] for i in self.locals["infos"] if "episode" in i)
            shapes = {name: np.shape(self.locals[name]) for name in ("dones", "rewards")}
            assert shapes == {"dones": (1,), "rewards": (1,)}
            for info, done in zip(self.locals["infos"], self.locals["dones"]):
                if done:
                    assert np.shape(info["terminal_observation"]) == (4,)
            return True

    make().learn(14, callback=Look())
    assert episodes == [RETURN] * 2


def test_callbacks_reach_logger_and_environment(make):
    class Look(Trace):
        def _on_step(self):
            self.logger.record("mine/number", 7)
            assert self.training_env is self.model.get_env()
            return True

    agent = make()
    dumps = logged(agent)
    agent.learn(14, callback=Look())
    assert any(values.get("mine/number") == 7 for values, _ in dumps)


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_evaluating_and_saving_does_not_change_what_is_learned(make, trained, tmp_path):
    callbacks = [
        EvalCallback(
            Monitor(CountingEnv()), best_model_save_path=str(tmp_path), log_path=str(tmp_path),
            eval_freq=10, n_eval_episodes=2, verbose=0,
        ),
        CheckpointCallback(12, str(tmp_path / "checkpoints"), name_prefix="c"),
    ]  # fmt: skip
    agent = make().learn(28, callback=callbacks)
    assert_same_agents(agent, trained)
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [10, 20] and results["results"].shape == (2, 2)
    assert make.cls.load(tmp_path / "best_model", device="cpu").num_timesteps in (10, 20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["c_12_steps.zip", "c_24_steps.zip"]
    loaded = make.cls.load(tmp_path / "checkpoints" / names[0], env=CountingEnv(), device="cpu")
    assert loaded.learn(7, reset_num_timesteps=False).num_timesteps >= 19


def test_a_stochastic_evaluation_does_not_change_what_is_learned(make, trained):
    env = Monitor(CountingEnv())
    evaluation = EvalCallback(env, eval_freq=10, deterministic=False, verbose=0)
    assert_same_agents(make().learn(28, callback=evaluation), trained)


def test_callbacks_of_stable_baselines3_stop_and_log(make, capsys):
    agent = make().learn(1000, callback=StopTrainingOnMaxEpisodes(3))
    assert agent.num_timesteps == 3 * LENGTH
    stop = StopTrainingOnRewardThreshold(reward_threshold=RETURN - 1)
    evaluation = EvalCallback(
        Monitor(CountingEnv()), callback_on_new_best=stop, eval_freq=5, n_eval_episodes=1, verbose=0
    )
    assert agent.learn(1000, callback=evaluation).num_timesteps == 5
    dumps, ticks = logged(agent), Trace()
    callbacks = [LogEveryNTimesteps(8), EveryNTimesteps(5, ticks), ProgressBarCallback()]
    agent.learn(21, callback=CallbackList(callbacks), log_interval=1000)
    assert [step for _, step in dumps] == [8, 16]
    assert ticks.events.count("step") == 4
    capsys.readouterr()
    agent.learn(7, progress_bar=True)
    shown = capsys.readouterr()
    assert "%" in shown.out + shown.err


# Environments


def test_set_env_continues_on_the_new_environment(make):
    agent = make().learn(14)
    env = CountingEnv(first=50)
    agent.set_env(env)
    agent.learn(14, reset_num_timesteps=False)
    assert agent.num_timesteps == 28 and env.steps == 14 and env.episode - 50 >= 2


def test_set_env_checks_the_number_of_environments_and_the_spaces(make):
    agent = make()
    with pytest.raises(AssertionError):
        agent.set_env(vector(7, 4))
    with pytest.raises(ValueError, match="spaces do not match"):
        agent.set_env(OtherSpaces())
    agent.set_env(agent.get_env())
    assert agent.learn(7).num_timesteps >= 7


def test_a_refused_environment_replaces_nothing(make, monkeypatch):
    agent = make().learn(14)
    env, last = agent.env, agent._last_obs

    def refuse():
        assert agent.env is not env
        raise ValueError("not this one")

    monkeypatch.setattr(agent, "_adopt_env", refuse)
    with pytest.raises(ValueError, match="not this one"):
        agent.set_env(CountingEnv())
    assert agent.env is env and agent._last_obs is last
    with pytest.raises(ValueError, match="spaces do not match"):
        agent.set_env(OtherSpaces())
    assert agent.env is env


@pytest.mark.parametrize("wrap", [Monitor, lambda env: env], ids=["monitor", "bare"])
def test_an_environment_that_reuses_its_array_is_learned_from_like_any_other(make, wrap):
    """What was learned is the same bit for bit as with an environment that returns copies."""
    agents = []
    for kind in (NoisyEnv, ReusingEnv):
        env = DummyVecEnv([lambda kind=kind: wrap(kind())] * 2)
        agents.append(make(env, seed=1).learn(2 * TRAINED))
    assert_same_agents(agents[1], agents[0])
    agents[1].set_env(agents[1].get_env())  # wrapped once, not again
    inner, layers = agents[1].get_env().envs[0], 0
    while isinstance(inner, gym.Wrapper):
        layers += isinstance(inner, CheckedEnv)
        inner = inner.env
    assert layers == 1


@pytest.mark.parametrize(
    ("scale", "offset"), [(1, 2**20), (4, 0), (2**-10, 0)], ids=["offset", "larger", "smaller"]
)
def test_observations_in_other_units_are_learned_from_alike(make, scale, offset):
    """In VecNormalize where the agent takes that: scaling is its task there."""
    envs, actions = [MeasuredEnv(), MeasuredEnv(scale, offset)], []
    for env in envs:
        vec_env: VecEnv = DummyVecEnv([lambda env=env: Monitor(env)])
        if takes_vec_normalize(make):
            vec_env = VecNormalize(vec_env, norm_reward=False, epsilon=2**-100)
            vec_env.obs_rms.count = 0.0  # SB3 starts as if 1e-4 observations of 0 had been seen
        agent = make(vec_env).learn(TRAINED)
        observations = env.measured(np.array(envs[0].seen))
        normalize = agent.get_vec_normalize_env()
        if normalize is not None:
            observations = normalize.normalize_obs(observations)
        actions.append(agent.predict(observations, deterministic=True)[0])
    np.testing.assert_array_equal(envs[1].seen, envs[0].seen)
    assert actions[0].std(0).min() > 1e-3
    np.testing.assert_allclose(actions[1], actions[0], rtol=0, atol=1e-5)


def test_gymnasiums_own_environment_through_its_id(make):
    agent = make(gym.make("Pendulum-v1", max_episode_steps=7)).learn(21)
    assert agent.num_timesteps >= 21 and torch.isfinite(parameters(agent)).all()


# Step sizes


def rates(dumps):
    found = [values.get("train/learning_rate") for values, _ in dumps]
    return [rate for rate in found if rate is not None]


@pytest.mark.parametrize(
    "schedule", [lambda progress: 1e-3 * progress, LinearSchedule(1e-3, 0.0, 1.0)]
)
def test_a_learning_rate_schedule_follows_the_progress_and_is_never_negative(make, schedule):
    agent = make(vector(7, 8, 9), learning_rate=schedule)
    dumps = logged(agent)
    agent.learn(100)
    agent.dump_logs()
    found = rates(dumps)
    assert len(found) > 1 and found == sorted(found, reverse=True)
    assert 0 <= found[-1] < found[0] <= 1e-3


def test_the_first_update_has_the_whole_step_size_and_the_last_one_its_share(make):
    """Of four rounds, as in CleanRL: 1 - (u - 1) / 4. PPO of SB3 ends with an update of 0."""
    agent = make(learning_rate=LinearSchedule(1e-3, 0.0, 1.0))
    dumps = logged(agent)
    agent.learn(28)
    agent.dump_logs()
    found = rates(dumps)
    assert found[0] == 1e-3 and found[-1] == pytest.approx(0.25e-3)


def test_a_learning_rate_is_a_number_or_a_schedule(make):
    agent = make(learning_rate=0.02)
    dumps = logged(agent)
    agent.learn(21)
    agent.dump_logs()
    assert set(rates(dumps)) == {0.02}
    assert agent.lr_schedule(0.3) == 0.02
