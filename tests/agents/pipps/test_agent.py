"""PIPPS beside the contract of tests/agents/contract/: its data, model and cost; that it learns.

All on tiny settings. `CountingEnv` makes every stored number predictable.
"""

import math
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import totalprop.envs  # noqa: F401  (registers the cart-pole)
from tests.agents.contract.probes import Memory, Trace, parameters
from totalprop import estimators
from totalprop.agents import PIPPS
from totalprop.agents.pipps.presets import PRESETS, RUNS
from totalprop.agents.trials.controllers import LinearPolicy, RBFPolicy

CARTPOLE = "totalprop/CartPoleSwingUp-v0"
LENGTH = 7
LOW, HIGH = -2.0, 4.0
TINY = {
    "n_particles": 20,
    "horizon": LENGTH,
    "gradient_steps": 3,
    "gp_evaluations": 5,
    "policy_kwargs": {"n_centres": 4},
    "seed": 0,
    "device": "cpu",
}


class CountingEnv(gym.Env):
    """Observation (position, time): episode e starts at (e, 0); a step adds (u / 10, 1).

    Reward -time after the step. Ends (terminates or truncates) after `length` steps. Nothing is
    random, actions lie in [-2, 4].
    """

    def __init__(self, length=LENGTH, first=0, truncates=False):
        self.observation_space = spaces.Box(-1e3, 1e3, (2,), np.float32)
        self.action_space = spaces.Box(LOW, HIGH, (1,), np.float32)
        self.length, self.episode, self.truncates = length, first, truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.state = np.array([self.episode, 0.0], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.state = self.state + np.array([float(action[0]) / 10, 1.0], np.float32)
        done = bool(self.state[1] >= self.length)
        reward = -float(self.state[1])
        return self.state.copy(), reward, done and not self.truncates, done and self.truncates, {}


class CostEnv(CountingEnv):
    """The same with a differentiable cost and a known start, as the cart-pole has."""

    initial_distribution = (np.array([3.0, 0.0]), np.array([0.1, 0.2]))

    def cost(self, states):
        return 1 - torch.exp(-0.5 * (states[..., 0] - 1.0) ** 2)


def vector(*lengths):
    """Counting environments of these lengths; number i starts its episodes at 100 i."""
    makers = [
        lambda length=length, i=i: Monitor(CountingEnv(length, first=100 * i))
        for i, length in enumerate(lengths)
    ]
    return DummyVecEnv(makers)


def make(env=None, policy="RBFPolicy", **changes):
    if policy != "RBFPolicy" and "policy_kwargs" not in changes:
        changes["policy_kwargs"] = {}
    return PIPPS(policy, CountingEnv() if env is None else env, **{**TINY, **changes})


def logged(agent):
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory


# Construction


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("RBFPolicy", RBFPolicy),
        ("LinearPolicy", LinearPolicy),
        (RBFPolicy, RBFPolicy),
        (LinearPolicy, LinearPolicy),
    ],
)
def test_policy_may_be_a_name_or_a_class(policy, expected):
    assert type(make(policy=policy).policy) is expected


def test_policy_kwargs_reach_the_policy():
    assert make(policy_kwargs={"n_centres": 9}).policy.n_centres == 9


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct(name):
    env_id = RUNS[name]["env_id"]
    agent = PIPPS(env=env_id, **PRESETS[name], device="cpu")
    # 50 RBF centres for the cart-pole; 2 (10 + 1) for the unicycle's linear controller
    expected = 254 if env_id == CARTPOLE else 22
    assert sum(p.numel() for p in agent.policy.parameters()) == expected
    assert agent.n_particles == 300
    assert agent.horizon == gym.spec(env_id).max_episode_steps
    for key, value in PRESETS[name].items():
        assert key == "policy" or getattr(agent, key) == value


WRONG = {
    "leg": ("rp", "one of score, biw, first-order"),
    "n_particles": (2, "at least 3"),
    "horizon": (0, "at least 1, a whole number"),
    "gradient_steps": (0, "at least 1"),
    "random_trials": (0, "at least 1, a whole number"),
    "random_scale": (1.5, r"in \[0, 1\]"),
    "noise_multiplier": (0.0, "above 0"),
    "adam_eps": (-1.0, "above 0"),
    "momentum": (1.0, r"in \[0, 1\)"),
    "gp_evaluations": (0, "at least 1"),
    "max_points": (-1, "at least 0"),
    "learning_rate": (-0.1, "at least 0"),
    "dropout": (1.0, r"in \[0, 1\)"),
    "noise_stop": (-1.0, "at least 0"),
    "time_step": (0.0, "above 0"),
    "kernel": ("linear", "one of rbf, rbf[+]linear"),
    "speed_integration": (True, "one of off, auto, on"),
    "optimizer": ("sgd", "one of .*adam.*rmsprop2018.*quasi-newton"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_one_sentence_with_the_value_and_the_remedy(name):
    value, expected = WRONG[name]
    with pytest.raises(ValueError, match=f"^{name} must be {expected}.*, got {value!r}$") as error:
        make(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("estimator", ["rp", "tpx", "gr"])
def test_quasi_newton_needs_fixed_noise(estimator):
    with pytest.raises(ValueError, match=r"quasi-newton.*deterministic.*'rp-fs' or 'gr-fs'"):
        make(estimator=estimator, optimizer="quasi-newton")


@pytest.mark.parametrize("wrong", ["tpxx", "gr-f"])
def test_unknown_estimator_lists_every_name_that_works(wrong):
    with pytest.raises(ValueError, match="unknown estimator") as error:
        make(estimator=wrong)
    listed = str(error.value).split("choose one of ")[1].split(", ")
    assert listed == [*estimators.names(), "gr", "rp-fs", "gr-fs"]


@pytest.mark.parametrize("name", ["angle_dims", "invariant_dims"])
@pytest.mark.parametrize("wrong", [(2,), (-1,), (0, 5), (1, 1)])
def test_dims_must_be_observations(name, wrong):
    with pytest.raises(ValueError, match=rf"{name} must be .*0\.\.1, each once, got"):
        make(**{name: wrong})


@pytest.mark.parametrize(
    "wrong", [((0, 2),), ((-1, 1),), ((0, 0),), ((0, 1), (1, 0)), (0, 1), ((0, 1, 1),)]
)
def test_integrated_dims_must_be_pairs_of_observations(wrong):
    sentence = (
        r"integrated_dims must be pairs \(position, velocity\) .*0\.\.1, each position .*, got"
    )
    with pytest.raises(ValueError, match=sentence):
        make(speed_integration="on", integrated_dims=wrong, time_step=1.0)


@pytest.mark.parametrize("known", [{}, {"time_step": 0.1}, {"integrated_dims": ((0, 1),)}])
def test_speed_integration_needs_to_know_the_velocities_and_the_time(known):
    with pytest.raises(
        ValueError, match=r"does not declare; pass integrated_dims=.* and time_step"
    ):
        make(speed_integration="on", **known)


@pytest.mark.parametrize("wrong", [(), ((0.0,),), (0.0, 1.0), ((0.0, math.nan),), (("a", "b"),), 3])
def test_start_means_must_be_observations(wrong):
    with pytest.raises(ValueError, match=r"start_means must be one or more observations of 2 numb"):
        make(start_means=wrong)


def test_there_must_be_a_particle_for_each_start():
    with pytest.raises(
        ValueError, match=r"n_particles must be at least 21, .* of the start, got 20"
    ):
        make(start_means=[(0.0, 0.0)] * 21)


@pytest.mark.parametrize("estimator", ["gr", "gr-fs"])
def test_resampled_particles_have_one_start(estimator):
    with pytest.raises(
        ValueError, match=r"fits one Gaussian to all particles, .* pass start_means="
    ):
        make(estimator=estimator, start_means=[(0.0, 0.0), (1.0, 1.0)])


def test_the_environments_own_starts_are_checked_too():
    class Two(CostEnv):
        initial_distribution = (np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([0.1, 0.2]))

    agent = make(Two(), estimator="gr")
    with pytest.raises(ValueError, match=r"fits one Gaussian to all particles, which start from 2"):
        agent.learn(7)


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"noise_stop": 2.0}])
@pytest.mark.parametrize("other", [{"optimizer": "rmsprop2018"}, {"estimator": "rp-fs"}])
def test_a_cooled_search_needs_adam(option, other):
    with pytest.raises(ValueError, match=r"scale the steps of optimizer 'adam'.* leave both at 0"):
        make(**option, **other)


def test_dropout_needs_basis_functions():
    with pytest.raises(ValueError, match=r"LinearPolicy has none; take 'RBFPolicy', or dropout=0"):
        make(policy="LinearPolicy", dropout=0.5)


def space_env(observation=None, action=None):
    env = CountingEnv()
    env.observation_space = observation or env.observation_space
    env.action_space = action or env.action_space
    return env


def test_discrete_actions_are_refused():
    with pytest.raises(AssertionError, match="Discrete"):
        make(space_env(action=spaces.Discrete(3)))


def test_action_matrices_are_refused():
    with pytest.raises(ValueError, match=r"a vector of real numbers as action.*an array of shape"):
        make(space_env(action=spaces.Box(-1, 1, (2, 2))))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Box(-1, 1, (2,))}),
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Discrete(4),
        spaces.Box(-1, 1, (2, 2)),
    ],
    ids=["dict", "image", "discrete", "matrix"],
)
def test_other_observations_are_refused(space):
    with pytest.raises(
        ValueError,
        match=r"models a vector.*; (wrap .*FlattenObs|take DreamerTPX)",
    ):
        make(space_env(observation=space))


def test_vec_normalize_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match=r"VecNormalize.*pass the environment without"):
        make(VecNormalize(DummyVecEnv([CountingEnv])))


# The loop


def test_learn_returns_self_and_uses_the_budget_exactly():
    agent = make()
    assert agent.learn(17) is agent
    assert agent.num_timesteps == 17
    assert len(agent.dynamics.inputs) == len(agent.reward_model.inputs) == 17


def test_overshoot_is_less_than_the_number_of_environments():
    agent = make(vector(7, 4, 5)).learn(20)
    assert agent.num_timesteps == 21


def test_counters():
    agent = make().learn(21)
    assert agent._n_updates == 9  # 3 trials of 3 gradient steps
    assert agent._n_trials == 3
    assert len(agent.ep_info_buffer) == 3
    assert [info["r"] for info in agent.ep_info_buffer] == [-28.0] * 3
    assert [info["l"] for info in agent.ep_info_buffer] == [7] * 3


def test_real_steps_of_a_stopped_trial_are_kept():
    """Real data are what is scarce: 10 steps were paid for, then 4."""
    agent = make()
    agent.learn(100, callback=Trace(stop_at=10))
    agent.learn(4, reset_num_timesteps=False)
    assert agent.num_timesteps == len(agent.dynamics.inputs) == 14


def test_random_trials_come_first_and_train_nothing():
    agent = make(random_trials=2)
    before = parameters(agent)
    agent.learn(7)
    assert agent._n_updates == 0 and torch.equal(parameters(agent), before)
    agent.learn(7, reset_num_timesteps=False)
    assert agent._n_updates == 3 and not torch.equal(parameters(agent), before)


def test_random_trials_fill_the_action_space_and_the_policy_acts_after():
    """200 uniform actions, seed 0: mean within 4 SE of the middle, extremes near the bounds."""
    env = CountingEnv(length=200)
    env = gym.wrappers.TimeLimit(env, 200)
    agent = make(env, "LinearPolicy", gradient_steps=1, horizon=1, learning_rate=0.1).learn(200)
    actions = agent.dynamics.inputs[:, 2].numpy()  # scaled to [-1, 1]
    assert abs(actions.mean()) < 4 / (3 * 200) ** 0.5
    assert actions.min() < -0.9 and actions.max() > 0.9 and len(np.unique(actions)) == 200
    expected, _ = agent.predict(np.array([2.0, 0.0], np.float32))  # where episode 2 starts
    agent.learn(1, reset_num_timesteps=False)
    found = env_action(agent.dynamics.inputs[-1:].numpy())
    assert abs(float(expected[0]) - 1) > 0.01  # not the middle, which a dead policy gives
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_reset_num_timesteps_false_continues_the_episode():
    env = CountingEnv()
    agent = make(env).learn(10)
    assert env.episode == 2
    agent.learn(4, reset_num_timesteps=False)
    assert agent.num_timesteps == 14 and env.state[1] == 0
    inputs, targets = agent.dynamics.inputs, agent.dynamics.targets
    np.testing.assert_array_equal(inputs[:, 1], [*range(7), *range(7)])
    np.testing.assert_allclose(targets[:, 1], 1.0)
    agent.learn(5)
    assert agent.num_timesteps == 5 and len(agent.dynamics.inputs) == 19


def test_learning_rate_schedule_follows_the_progress(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(learning_rate=lambda progress: 0.1 + progress).learn(21)
    rates = [settings.learning_rate for _, settings in seen]
    assert len(rates) == 3 and rates[0] > rates[1] > rates[2]
    assert 0.1 <= rates[2] < 0.5 and rates[0] > 0.5


def test_stored_data_never_cross_an_episode_of_one_environment():
    agent = make().learn(20)
    check_data(agent, [(1, range(7)), (2, range(7)), (3, range(6))])


@pytest.mark.parametrize("truncates", [False, True])
def test_terminal_observations_are_used_at_episode_ends(truncates):
    agent = make(CountingEnv(truncates=truncates)).learn(14)
    check_data(agent, [(1, range(7)), (2, range(7))])


def test_stored_data_of_two_environments():
    """Lengths 7 and 4: a trial lasts until both have ended an episode."""
    agent = make(vector(7, 4)).learn(14)
    inputs, targets = agent.dynamics.inputs.numpy(), agent.dynamics.targets.numpy()
    assert len(inputs) == 14
    np.testing.assert_array_equal(inputs[0::2, 1], [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(inputs[1::2, 1], [0, 1, 2, 3, 0, 1, 2])
    np.testing.assert_array_equal(np.floor(inputs[[0, 1, 9], 0]), [1, 101, 102])
    np.testing.assert_allclose(targets[:, 1], 1.0)
    np.testing.assert_allclose(targets[:, 0], env_action(inputs) / 10, atol=2e-5)
    assert agent._n_trials == 1
    starts = np.stack(agent._start_observations)
    np.testing.assert_array_equal(starts, [[1, 0], [101, 0], [102, 0]])


class ConstantCoordinate(CountingEnv):
    """A third observation that never changes, such as a goal."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-1e3, 1e3, (3,), np.float32)

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return np.append(observation, np.float32(0.1)), info

    def step(self, action):
        observation, *rest = super().step(action)
        return np.append(observation, np.float32(0.1)), *rest


@pytest.mark.parametrize("name", ["rp", "lr", "tpx", "tp"])
def test_a_coordinate_that_never_changes_is_no_trouble(name):
    agent = make(ConstantCoordinate(), estimator=name, gp_evaluations=200)
    memory = logged(agent)
    agent.learn(8 * LENGTH)
    assert torch.isfinite(parameters(agent)).all()
    assert all(values["train/skipped_steps"] == 0 for values, _ in memory.dumps)


def env_action(inputs):
    return LOW + (HIGH - LOW) * (inputs[:, 2] + 1) / 2


def check_data(agent, episodes):
    """Inputs, targets and rewards of whole (or begun) episodes, all known beforehand."""
    inputs, targets = agent.dynamics.inputs.numpy(), agent.dynamics.targets.numpy()
    times = np.concatenate([list(steps) for _, steps in episodes])
    np.testing.assert_array_equal(inputs[:, 1], times)
    for start in np.flatnonzero(times == 0):
        assert inputs[start, 0] in [number for number, _ in episodes]
    np.testing.assert_allclose(targets[:, 1], 1.0)
    np.testing.assert_allclose(targets[:, 0], env_action(inputs) / 10, atol=2e-6)
    rewards = agent.reward_model
    np.testing.assert_array_equal(rewards.targets[:, 0], -(times + 1))
    np.testing.assert_allclose(rewards.inputs[:, 1], times + 1)  # rewards belong to next states
    np.testing.assert_allclose(rewards.inputs[:, 0], inputs[:, 0] + targets[:, 0], atol=1e-6)
    np.testing.assert_array_equal(rewards.inputs[:, 2], inputs[:, 2])


@pytest.mark.parametrize("scale", [0.2, 0.0])
def test_random_actions_may_be_a_fraction_about_the_middle(scale):
    """100 uniform actions of that fraction of [-2, 4], whose middle is 1; scaled, of [-1, 1]."""
    env = gym.wrappers.TimeLimit(CountingEnv(length=100), 100)
    agent = make(env, "LinearPolicy", gradient_steps=1, horizon=1, random_scale=scale).learn(100)
    actions = agent.dynamics.inputs[:, 2].numpy()
    assert np.abs(actions).max() <= scale + 1e-6
    if scale:
        assert actions.min() < -0.9 * scale and actions.max() > 0.9 * scale


def test_invariant_dims_are_hidden_from_the_model_but_not_from_the_policy(tmp_path):
    agent = make(invariant_dims=(0,)).learn(14)
    np.testing.assert_array_equal(agent.dynamics.inputs[:, 0], [*range(7), *range(7)])
    assert agent.dynamics.inputs.shape == (14, 2)  # time and action
    assert agent.reward_model.inputs.shape == (14, 3)
    assert agent.policy.n_features == 2
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", device="cpu")
    assert loaded.invariant_dims == (0,)
    torch.testing.assert_close(loaded.dynamics.inputs, agent.dynamics.inputs, rtol=0, atol=0)


def test_invariant_dims_are_the_environments_unless_they_are_given(tmp_path):
    class Translated(CountingEnv):
        invariant_dims = (0,)

    agent = make(Translated())
    assert agent.invariant_dims == (0,)
    assert make(Translated(), invariant_dims=()).invariant_dims == ()
    assert make().invariant_dims == ()
    agent.learn(7).save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu")  # says nothing
    assert loaded.learn(7).dynamics.inputs.shape[1] == 2


OPTIONS = {
    "speed_integration": "on", "integrated_dims": ((0, 1),), "time_step": 0.5,
    "start_means": ((0.0, 0.0), (1.0, 0.0)), "kernel": "rbf+linear", "dropout": 0.5,
    "noise_stop": 2.0, "gradient_steps": 6, "keep_best": True,
}  # fmt: skip


def test_velocities_are_predicted_and_positions_integrated():
    agent = make(speed_integration="on", integrated_dims=((0, 1),), time_step=0.5).learn(14)
    assert agent.dynamics.inputs.shape == (14, 3)  # position, time, action
    assert agent.dynamics.targets.shape == (14, 1)
    np.testing.assert_allclose(agent.dynamics.targets, 1.0)  # of the time, which stands in for one
    q, v = agent._predicted[..., 0], agent._predicted[..., 1]
    np.testing.assert_allclose(q[1:], q[:-1] + 0.25 * (v[:-1] + v[1:]), atol=1e-12)


class Mechanical(CountingEnv):
    integrated_dims, time_step = ((0, 1),), 0.25


@pytest.mark.parametrize("env", [CountingEnv, Mechanical])
def test_automatic_speed_integration_is_for_environments_that_declare_velocities(env):
    agent = make(env(), speed_integration="auto").learn(14)
    assert agent.dynamics.targets.shape[1] == (1 if env is Mechanical else 2)


def test_speed_integration_is_the_environments_unless_it_is_given(tmp_path):
    agent = make(Mechanical(), speed_integration="on")
    assert (agent.integrated_dims, agent.time_step) == (((0, 1),), 0.25)
    assert make(Mechanical(), speed_integration="on", time_step=0.5).time_step == 0.5
    off = make(Mechanical())
    assert off.integrated_dims is None and off.dynamics.targets.shape[1] == 2
    agent.learn(7).save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu")  # says nothing
    assert loaded.learn(7).dynamics.targets.shape[1] == 1


@pytest.mark.parametrize("env_id", [CARTPOLE, "totalprop/Unicycle-v0"])
def test_our_environments_declare_their_velocities(env_id):
    """A small step: a position moves by T times its velocity, whatever the action."""
    env = gym.make(env_id, noise=0.0).unwrapped
    agent = PIPPS("LinearPolicy", env, speed_integration="on", termination="ignore", device="cpu")
    before, _ = env.reset(seed=0)
    after, *_ = env.step(0.1 * np.ones(env.action_space.shape, np.float32))
    model = agent.world_model
    assert model.n_states - len(model.predicted_dims) == {4: 2, 10: 3}[model.n_states]
    states = torch.tensor(np.stack((before, after)), dtype=torch.float64)
    arrived = model.complete(states[:1], states[1:, model.predicted_dims])[0]
    positions = [q for q, _ in agent.integrated_dims]
    moved = (states[1] - states[0])[positions]
    torch.testing.assert_close((arrived - states[0])[positions], moved, rtol=0.05, atol=1e-3)


def test_particles_start_from_the_given_means():
    agent = make(CostEnv(), start_means=np.array([[5.0, 1.0], [-5.0, 2.0]])).learn(7)
    assert agent.start_means == ((5.0, 1.0), (-5.0, 2.0))
    start = agent._predicted[0]
    for i, mean in enumerate(agent.start_means):
        assert np.abs((start[i::2] - mean) / [0.1, 0.2]).max() < 5


def test_a_saved_agent_with_every_option_predicts_and_learns_the_same(tmp_path):
    agent = make(**OPTIONS).learn(14)
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu")
    for name, value in OPTIONS.items():
        assert getattr(loaded, name) == value, name
    observations = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    actions = agent.predict(observations)[0]
    np.testing.assert_array_equal(loaded.predict(observations)[0], actions)
    states = torch.randn(5, 2, dtype=torch.float64)
    found, expected = (a.world_model.predict(states, states[:, :1]) for a in (loaded, agent))
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)
    assert loaded.learn(7, reset_num_timesteps=False).num_timesteps == 21


def test_predict_leaves_nothing_out():
    """A dropout is of a search: the policy that acts has all of its basis functions."""
    agent = make(dropout=0.9).learn(14)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    actions, again = agent.predict(x)[0], agent.predict(x)[0]
    np.testing.assert_array_equal(actions, again)
    with torch.no_grad():
        expected = agent.policy.act(torch.tensor(x, dtype=torch.float64)).float().numpy()
    np.testing.assert_array_equal(actions, agent.policy.unscale_action(expected))


def test_angle_dims_reach_model_and_policy():
    agent = make(angle_dims=(1,)).learn(14)
    inputs = agent.dynamics.inputs.numpy()  # position, sin time, cos time, action
    assert inputs.shape == (14, 4) and agent.policy.n_features == 3
    times = np.array([*range(7), *range(7)], dtype=float)
    np.testing.assert_allclose(inputs[:, 1], np.sin(times), atol=1e-12)
    np.testing.assert_allclose(inputs[:, 2], np.cos(times), atol=1e-12)
    np.testing.assert_allclose(agent.dynamics.targets[:, 1], 1.0)  # the raw difference
    np.testing.assert_allclose(agent.reward_model.inputs[:, 1], np.sin(times + 1), atol=1e-6)


class Drifting(gym.Env):
    """A noisy linear system, seen as offset + scale · state; all in multiples of 2⁻²⁰.

    The reward, which a GP learns, is minus the distance of the state from 1, plus `bonus`.
    """

    def __init__(self, offset=0.0, scale=(1.0, 1.0), bonus=0.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.offset, self.scale, self.bonus, self.rng = offset, np.array(scale), bonus, None

    def observe(self):
        self.state = np.round(self.state * 2**20) * 2.0**-20
        return self.offset + self.scale * self.state

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.rng = np.random.default_rng(0) if self.rng is None else self.rng
        self.state, self.time = 0.1 * self.rng.normal(size=2), 0
        return self.observe(), {}

    def step(self, action):
        speed = self.state[1] + 0.3 * float(action[0])
        self.state = np.array([self.state[0] + 0.3 * speed, 0.9 * speed])
        self.state += 0.02 * self.rng.normal(size=2)
        self.time += 1
        reward = self.bonus - abs(float(self.state[0]) - 1)
        return self.observe(), reward, False, self.time >= LENGTH, {}


@pytest.mark.parametrize("estimator", ["tpx", "tp", "gr"])
@pytest.mark.parametrize(
    "change",
    [{"offset": 2.0**26}, {"bonus": 2.0**10}],
    ids=["observations", "rewards"],
)
def test_offsets_of_observations_and_rewards_do_not_matter(change, estimator):
    """The same trials, and the same actions at the same states."""
    actions = []
    states = np.round(np.random.default_rng(1).normal(size=(30, 2)) * 2**20) * 2.0**-20
    for changes in ({}, change):
        env = Drifting(**changes)
        agent = make(env, estimator=estimator, gp_evaluations=20).learn(3 * LENGTH)
        actions.append(agent.predict(env.offset + env.scale * states)[0])
    assert actions[0].std() > 0.05
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-4)


@pytest.mark.parametrize("scale", [(2.0**-20, 2.0**15), (2.0**10, 2.0**10)])
def test_units_of_the_observations_do_not_matter_to_the_first_simulation(scale):
    """The policy, placed over the data, has the same cost and k. Adam's steps have units."""
    found = []
    for changes in ({}, {"scale": scale}):
        agent = make(Drifting(**changes), gp_evaluations=20)
        memory = logged(agent)
        agent.learn(LENGTH)
        values = memory.dumps[-1][0]
        found.append([values[name] for name in ("train/loss_first", "k/coordinate_0", "k/step_03")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# Which model, which cost


def spy_on_search(monkeypatch):
    """Records the particle model and settings of every policy search."""
    from totalprop.agents.pipps import agent as pipps

    seen, original = [], pipps.optimise_policy

    def spy(policy, model, settings, *rest):
        seen.append((model, settings))
        return original(policy, model, settings, *rest)

    monkeypatch.setattr(pipps, "optimise_policy", spy)
    return seen


STATE = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=torch.float64)
ACTION = torch.tensor([[0.1], [0.2]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (lambda self, states, action: states.sum(-1), "it raised TypeError"),
        (lambda self, states: (states[..., 0] > 0).double(), "must be differentiable"),
        (lambda self, states: (states**2).sum(), r"a tensor \[2, 3\], got \[\]"),
        (lambda self, states: np.square(states.numpy()).sum(-1), "it raised RuntimeError"),
    ],
    ids=["with action", "steps", "one for all", "numpy"],
)
def test_a_cost_of_another_kind_is_not_the_environments_cost(own, why, monkeypatch):
    """Many environments have a method of that name."""
    env = CountingEnv()
    env.cost = types.MethodType(own, env)
    with pytest.warns(UserWarning, match=rf"own `cost` is not used, because.*{why}"):
        agent = make(env)
    seen = spy_on_search(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent.learn(14)
    found = seen[0][0].cost(STATE, ACTION)
    assert found.shape == (2,) and not torch.equal(found, STATE.sum(-1))


@pytest.mark.parametrize("own", [(np.zeros(3), np.ones(3)), (np.zeros(2),), lambda: None])
def test_a_start_of_another_kind_is_learned_from_the_resets(own, monkeypatch):
    env = CountingEnv()
    env.initial_distribution = own
    agent = make(env)
    seen = spy_on_search(monkeypatch)
    with pytest.warns(UserWarning, match=r"`initial_distribution` is not used, because it must be"):
        agent.learn(14)
    starts = [model.start_mean.tolist() for model, _ in seen]
    assert starts[0] == [1.0, 0.0] and starts[-1] == [1.5, 0.0]  # resets to 1 and then 2


def test_a_registered_estimator_keeps_its_legs(monkeypatch):
    mine = estimators.Estimator(
        estimators.mixing.tpx, legs=(estimators.legs.score, estimators.legs.biw), cross_fit=True
    )
    monkeypatch.setitem(estimators.registry._REGISTRY, "mine", mine)
    assert make(estimator="mine")._resolved_estimator() == mine
    assert make(estimator="mine", leg="biw")._resolved_estimator().legs == (estimators.legs.biw,)


def test_actions_lie_in_a_space_whose_bounds_single_precision_has_not():
    """The saturated policy reaches them: rounding carried it one unit in the last place beyond."""
    for seed in range(20):
        low, high = np.sort(np.random.default_rng(seed).normal(size=2)).astype(np.float32)

        class Strict(CountingEnv):
            def __init__(self, low=low, high=high):
                super().__init__()
                self.action_space = spaces.Box(low, high, (1,), np.float32)

        agent = make(Strict())
        agent.policy.act = lambda x: torch.sign(x[:, :1])
        for x in (-1, 1):
            action, _ = agent.predict(np.array([x, 0], np.float32))
            assert agent.action_space.contains(action), (low, high, action)


def test_action_spaces_without_room_are_refused():
    env = CountingEnv()
    env.action_space = spaces.Box(np.zeros(2), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="PIPPS needs a vector of real numbers as action"):
        make(env)


def test_angle_dims_must_be_several():
    with pytest.raises(ValueError, match=r"e.g. \(1,\), got 1"):
        make(angle_dims=1)


def test_a_stop_at_the_end_of_the_random_trial_ends_it():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps != LENGTH

    agent = make().learn(100, callback=Stop())
    assert agent.num_timesteps == LENGTH and agent._n_updates == 0
    agent.learn(1, reset_num_timesteps=False)  # the search, a step of its policy, and another
    assert agent._n_trials == 2 and agent._n_updates == 6


def test_names_of_observations_may_be_an_array_and_must_fit(tmp_path):
    for names in (np.array(["x", "t"]), ["x"]):
        env = CountingEnv()
        env.observation_names = names
        make(env, tensorboard_log=str(tmp_path)).learn(21)


def test_given_cost_comes_first(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(CostEnv(), cost_fn=lambda states: 7 * states[..., 1]).learn(7)
    torch.testing.assert_close(seen[0][0].cost(STATE, ACTION), 7 * STATE[:, 1])


def test_environments_cost_and_start_are_found_through_wrappers(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(DummyVecEnv([lambda: Monitor(CostEnv())])).learn(7)
    model = seen[0][0]
    torch.testing.assert_close(model.cost(STATE, ACTION), CostEnv().cost(STATE))
    np.testing.assert_array_equal(model.start_mean, [3.0, 0.0])
    np.testing.assert_array_equal(model.start_std, [0.1, 0.2])


def test_without_a_cost_a_gp_learns_the_rewards(monkeypatch):
    """The reward is -time; the model's cost at the observed next states must be the time."""
    seen = spy_on_search(monkeypatch)
    agent = make(gp_evaluations=100).learn(21)
    inputs = agent.reward_model.inputs
    found = seen[-1][0].cost(inputs[:, :2], inputs[:, 2:])
    torch.testing.assert_close(found, inputs[:, 1], atol=0.3, rtol=0)
    found = seen[-1][0].cost(inputs[:, :2].reshape(3, 7, 2), inputs[:, 2:].reshape(3, 7, 1))
    assert found.shape == (3, 7)


def test_max_points_bounds_the_data_of_both_models():
    everything, few = make().learn(21), make(max_points=10).learn(21)
    assert len(everything.dynamics.inputs) == 21
    for gp in (few.dynamics, few.reward_model):
        assert len(gp.inputs) == len(gp.targets) == 10
    # The first two of the three trials are random or of a policy of all points: the same.
    assert torch.equal(few.dynamics.inputs[:3], everything.dynamics.inputs[11:14])


def test_reward_model_sees_the_action(monkeypatch):
    """The reward is minus the action; the model's cost must follow the scaled action."""

    class Costly(CountingEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, -float(action[0]), *rest

    seen = spy_on_search(monkeypatch)
    agent = make(Costly(), gp_evaluations=100, random_trials=3).learn(21)
    inputs = agent.reward_model.inputs
    found = seen[-1][0].cost(inputs[:, :2], inputs[:, 2:])
    np.testing.assert_allclose(found, env_action(inputs.numpy()), atol=0.5)


def test_start_distribution_is_that_of_the_resets(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make().learn(21)
    model = seen[-1][0]  # episodes start at (1, 0), (2, 0), (3, 0)
    np.testing.assert_allclose(model.start_mean, [2.0, 0.0])
    assert float(model.start_std[0]) == pytest.approx((2 / 3) ** 0.5)
    assert 0 < float(model.start_std[1]) < 0.2  # no spread seen: that of the noise at most


def test_what_is_set_after_construction_counts_at_the_next_search(monkeypatch):
    seen = spy_on_search(monkeypatch)
    env = CostEnv()
    agent = make(env).learn(7)
    env.initial_distribution = (np.array([5.0, 1.0]), np.array([0.3, 0.4]))
    agent.cost_fn = cost_of_time
    agent.termination_cost = 2.0
    agent.learn(7, reset_num_timesteps=False)
    np.testing.assert_array_equal(seen[0][0].start_mean, [3.0, 0.0])
    np.testing.assert_array_equal(seen[1][0].start_mean, [5.0, 1.0])
    torch.testing.assert_close(seen[1][0].cost(STATE, ACTION), STATE[:, 1])
    assert (seen[0][0].termination_cost, seen[1][0].termination_cost) == (0.0, 2.0)


# Where episodes end


def late(states):
    """Probability that a CountingEnv's episode ends: 1 from its last step on."""
    return torch.sigmoid(1e4 * (states[..., 1] - LENGTH + 0.5))


def messages(learn):
    """What a function warns of, without the framework's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn()
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_the_first_terminated_episode_is_reported_once():
    agent = make()
    found = messages(lambda: agent.learn(3 * LENGTH))
    assert [m for m in found if "terminated" in m] == [
        f"an episode terminated at step {LENGTH}, but simulated particles do not end: they go on "
        "beyond it, at the costs of the states there. Pass termination=..., a function of the "
        "states, and termination_cost=..., the cost of a step after the end; or "
        "termination='ignore'"
    ]


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        (CountingEnv(truncates=True), {}),
        (CountingEnv(), {"termination": "ignore"}),
        (CountingEnv(), {"termination": late, "termination_cost": 7.0}),
    ],
    ids=["truncated", "ignored", "known"],
)
def test_an_end_that_is_known_is_not_reported(env, changes):
    agent = make(env, **changes)
    assert messages(lambda: agent.learn(3 * LENGTH)) == []


def test_ended_particles_cost_what_the_user_says(monkeypatch):
    """The cost is 1 a step, an episode ends after 7 of 10 steps, at -2 a step afterwards."""
    losses = []
    for end in (0.0, -2.0):
        agent = make(
            CountingEnv(), horizon=10, termination=late, termination_cost=end, gp_evaluations=100,
            cost_fn=lambda states: 1 + 0 * states[..., 0],
        )  # fmt: skip
        memory = logged(agent)
        agent.learn(LENGTH)
        losses.append(memory.dumps[-1][0]["train/loss"])
    assert losses == pytest.approx([7.0, 7.0 - 2 * 3], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({}, True),
        ({"termination_cost": 9.0}, False),
        ({"termination": "ignore"}, False),
        ({"cost_fn": lambda states: 0 * states[..., 0] - 1}, False),
        ({"cost_fn": lambda states: 0 * states[..., 0]}, False),
    ],
    ids=["free", "costs", "no end", "steps are worth something", "all is free"],
)
def test_an_end_that_is_cheaper_than_every_step_is_reported_once(changes, warns):
    """Rewards of CountingEnv are -1 to -7, of which the policy would spare itself some."""
    agent = make(**{"termination": late, **changes})
    found = [m for m in messages(lambda: agent.learn(2 * LENGTH)) if "cost nothing" in m]
    assert len(found) == warns
    assert not warns or ("before it 4 on average" in found[0] and "termination_cost=7" in found[0])


@pytest.mark.parametrize(
    ("cost", "warns"),
    [
        (lambda self, states: states[..., 1], False),
        (lambda self, states: states[..., 1] + 100, False),
        (lambda self, states: 2 * states[..., 1], True),
        (lambda self, states: states[..., 0], True),
    ],
    ids=["rewards", "offset", "scale", "another"],
)
def test_an_own_cost_that_is_not_minus_the_rewards_is_reported_once(cost, warns, monkeypatch):
    monkeypatch.setattr(CountingEnv, "cost", cost, raising=False)
    found = messages(lambda: make(CountingEnv(truncates=True)).learn(2 * LENGTH))
    assert ["rewards are not minus its own `cost`" in m for m in found] == [True] * warns
    given = make(CountingEnv(truncates=True), cost_fn=lambda states: states[..., 0])
    assert messages(lambda: given.learn(LENGTH)) == []


class Falling(CountingEnv):
    """Knows where its episodes end."""

    def termination(self, states):
        return late(states)


def test_the_environments_own_termination_is_used(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(Falling()).learn(LENGTH)
    make(Falling(), termination=lambda states: states[..., 0] > 1).learn(LENGTH)
    make(Falling(), termination="ignore").learn(LENGTH)
    ends = [model.termination for model, _ in seen]
    assert torch.equal(ends[0](STATE), late(STATE))
    assert torch.equal(ends[1](STATE), STATE[:, 0] > 1) and ends[2] is None


def test_a_step_function_is_reported_where_pathwise_gradients_are_used():
    for termination, estimator, is_told in [
        (lambda states: states[..., 1] > 6, "tpx", True),
        (lambda states: states[..., 1] > 6, "lr", False),
        (late, "tpx", False),
    ]:
        agent = make(termination=termination, estimator=estimator)
        found = messages(lambda agent=agent: agent.learn(LENGTH))
        assert any("pathwise gradient sees nothing" in m for m in found) == is_told


def test_a_termination_is_asked_for_again_when_a_file_is_read(tmp_path):
    make(termination=late).learn(LENGTH).save(tmp_path / "agent")
    lost = PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu")
    with pytest.raises(ValueError, match=r"made with a termination.*termination=\.\.\."):
        lost.learn(LENGTH)
    PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu", termination=late).learn(LENGTH)
    make(termination="ignore").save(tmp_path / "other")
    assert PIPPS.load(tmp_path / "other", device="cpu").termination == "ignore"


@pytest.mark.parametrize(
    ("termination", "message"),
    [
        (3, "termination must be a function, got 3"),
        ("absorbing", "termination must be .*got 'absorbing'"),
        (lambda states: states[..., 0] + 2, r"probability in \[0, 1\], got 2"),
        (lambda states: states > 0, r"a tensor \[2, 3\], got \[2, 3, 2\]"),
    ],
)
def test_what_is_no_termination_is_refused_by_the_constructor(termination, message):
    with pytest.raises(ValueError, match=message):
        make(termination=termination)


# Trials without an end


@pytest.mark.parametrize("envs", [1, 2])
def test_trials_without_a_time_limit_are_truncated_at_the_horizon(envs):
    agent = make(vector(*[10**6] * envs), horizon=20)
    memory = logged(agent)
    found = messages(lambda: agent.learn(100 * envs))
    assert agent._n_trials == 5 and agent._n_updates == 15
    for values, _ in memory.dumps:
        assert values["rollout/ep_len_mean"] == 20
        assert values["rollout/ep_rew_mean"] == -sum(range(1, 21))
    inputs = agent.dynamics.inputs
    np.testing.assert_array_equal(inputs[::envs, 1], [*range(20)] * 5)
    starts = [[100 * i + trial, 0] for trial in range(1, 6) for i in range(envs)]
    np.testing.assert_array_equal(agent._start_observations, starts)
    assert found == [
        "the environment declares no time limit: a trial is truncated after horizon=20 steps; "
        "gymnasium.wrappers.TimeLimit sets another one"
    ]


def test_a_time_limit_of_the_environment_is_the_length_of_a_trial():
    env = gym.wrappers.TimeLimit(CountingEnv(10**6), 12)
    agent = make(env, horizon=5)
    found = messages(lambda: agent.learn(36))
    assert agent._n_trials == 3 and agent.ep_info_buffer[-1]["l"] == 12
    assert found == [
        "horizon=5, but the environment's episodes are truncated after 12 steps: the policy is "
        "optimised for the first 5 only; choose horizon=12, or another TimeLimit"
    ]


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"horizon": 30}, 24, "horizon=30, but.*after 12 steps.*for steps that never come"),
        ({}, 11, "total_timesteps=11 are less than one trial, of 12 steps"),
        ({"random_trials": 3}, 24, "total_timesteps=24 are used up by random_trials=3, of 12"),
    ],
)
def test_lengths_that_do_not_fit_are_said_at_the_start(changes, steps, message):
    env = gym.wrappers.TimeLimit(CountingEnv(10**6), 12)
    agent = make(env, **{"horizon": 12, **changes})
    with pytest.warns(UserWarning, match=message):
        agent.learn(steps, callback=Trace(stop_at=1))
    assert agent.num_timesteps == 1


def test_lengths_that_fit_are_not_remarked_on():
    agent = make(gym.wrappers.TimeLimit(CountingEnv(10**6), 12), horizon=12)
    assert messages(lambda: agent.learn(24)) == []


def test_options_reach_the_particle_model(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(model_uncertainty=False, noise_multiplier=4.0).learn(7)
    assert seen[0][0].model_uncertainty is False and seen[0][0].noise_multiplier == 4.0


def test_options_reach_the_search(monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(leg="biw", cross_fit=True, learning_rate=0.5, optimizer="rmsprop2018").learn(7)
    settings = seen[0][1]
    assert settings.estimator.legs == (estimators.legs.biw,) and settings.estimator.cross_fit
    assert settings.learning_rate == 0.5 and settings.optimizer == "rmsprop2018"
    assert (settings.gradient_steps, settings.n_particles, settings.horizon) == (3, 20, LENGTH)


def test_an_estimator_object_is_used_as_it_is(monkeypatch):
    seen = spy_on_search(monkeypatch)
    mine = estimators.make("tpx", cross_fit=True)
    make(estimator=mine).learn(7)
    assert seen[0][1].estimator == mine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": estimators.make("lr"), "leg": "biw"}, "brings its own legs and cross_fit"),
        ({"estimator": estimators.make("lr"), "cross_fit": True}, "brings its own legs"),
        ({"estimator": "ivw", "cross_fit": True}, "set cross_fit=False"),
        (
            {"estimator": estimators.make("tpx", baseline=estimators.baselines.critic)},
            "baseline 'critic' needs value=",
        ),
        ({"cross_fit": True, "n_particles": 5}, "n_particles must be at least 6 with cross_fit"),
        (
            {"estimator": estimators.make("tpx", cross_fit=True), "n_particles": 5},
            "n_particles must be at least 6 with cross_fit",
        ),
        ({"cost_fn": lambda states: states[..., :1] ** 2}, r"a tensor \[2, 3\], got \[2, 3, 1\]"),
        ({"cost_fn": lambda states, actions: states.sum(-1)}, "it raised TypeError: .*'actions'"),
        ({"cost_fn": lambda states: 1.0}, r"a tensor \[2, 3\], got float"),
        ({"cost_fn": lambda states: (states[..., 0] > 0).double()}, "must be differentiable"),
        ({"noise_multiplier": None}, "noise_multiplier must be above 0, got None"),
        (
            {"noise_multiplier": np.inf},
            "noise_multiplier must be above 0, a finite number, got inf",
        ),
        ({"learning_rate": "0.1"}, "learning_rate must be at least 0, got '0.1'"),
        ({"horizon": True}, "horizon must be at least 1, a whole number, got True"),
    ],
)
def test_what_cannot_work_is_refused_by_the_constructor(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_whole_numbers_of_numpy_are_taken():
    assert make(n_particles=np.int64(20)).n_particles == 20


@pytest.mark.parametrize(
    ("name", "resample", "fixed", "optimizer"),
    [
        ("gr", True, False, "adam"),
        ("rp-fs", False, True, "quasi-newton"),
        ("gr-fs", True, True, "quasi-newton"),
        ("tpx", False, False, "adam"),
    ],
)
def test_variants_of_2018(name, resample, fixed, optimizer, monkeypatch):
    seen = spy_on_search(monkeypatch)
    make(estimator=name).learn(7)
    settings = seen[0][1]
    assert (settings.resample, settings.fixed_noise) == (resample, fixed)
    assert settings.optimizer == optimizer
    assert (settings.estimator.weight is estimators.mixing.pathwise) == (name != "tpx")


@pytest.mark.parametrize("leg", ["score", "biw", "first-order"])
@pytest.mark.parametrize("name", [*estimators.names(), "gr", "rp-fs", "gr-fs"])
def test_every_estimator_runs_a_trial(name, leg):
    if name == "rp-cut" and leg != "score":
        with pytest.raises(ValueError, match=r"leave legs out \(leg='score' of an agent\)"):
            make(CARTPOLE, estimator=name, leg=leg, horizon=3)
        return
    agent = make(CARTPOLE, estimator=name, leg=leg, horizon=3)
    agent.learn(4)
    assert agent._n_updates >= 3 and torch.isfinite(parameters(agent)).all()
    assert np.isfinite(agent.predict(np.zeros(4, np.float32))[0]).all()


@pytest.mark.parametrize("policy", ["RBFPolicy", "LinearPolicy"])
@pytest.mark.parametrize(
    ("optimizer", "estimator"),
    [("adam", "tp"), ("rmsprop2018", "tp"), ("quasi-newton", "rp-fs"), ("quasi-newton", "gr-fs")],
)
def test_every_optimizer_changes_the_policy(optimizer, estimator, policy):
    agent = make(CARTPOLE, policy, optimizer=optimizer, estimator=estimator)
    agent.learn(5)
    before = parameters(agent)
    agent.learn(3, reset_num_timesteps=False)
    assert not torch.equal(parameters(agent), before)
    assert torch.isfinite(parameters(agent)).all()


def test_an_environment_without_cost_from_gymnasium():
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    agent = make(env).learn(20)
    assert agent.num_timesteps == 20 and agent.reward_model.is_fitted
    action, _ = agent.predict(env.observation_space.sample())
    assert env.action_space.contains(action)


# Callbacks of stable-baselines3


# Prediction


def test_predict_single_batch_and_deterministic():
    agent = make().learn(7)
    observations = np.array([[1.0, 0.0], [2.0, 3.0], [0.5, 6.0]], np.float32)
    batch, state = agent.predict(observations, deterministic=True)
    assert batch.shape == (3, 1) and batch.dtype == np.float32 and state is None
    for observation, action in zip(observations, batch, strict=True):
        single, _ = agent.predict(observation)
        assert single.shape == (1,) and agent.action_space.contains(single)
        np.testing.assert_allclose(single, action, rtol=1e-6)
    scaled = agent.policy.act(torch.from_numpy(observations).double()).detach().numpy()
    np.testing.assert_allclose(batch, LOW + (HIGH - LOW) * (scaled + 1) / 2, atol=1e-5)


# Saving


OBSERVATIONS = np.random.default_rng(0).uniform(-1, 5, (20, 2)).astype(np.float32)


@pytest.mark.parametrize("policy", ["RBFPolicy", "LinearPolicy"])
def test_save_load_predict_is_identical(policy, tmp_path):
    agent = make(policy=policy, angle_dims=(1,), estimator="tp", learning_rate=0.02).learn(10)
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", device="cpu")
    for key, value in agent.get_parameters().items():
        for name, tensor in value.items():
            assert torch.equal(tensor, loaded.get_parameters()[key][name]), (key, name)
    expected, _ = agent.predict(OBSERVATIONS)
    assert np.array_equal(loaded.predict(OBSERVATIONS)[0], expected)
    assert loaded.num_timesteps == 10 and loaded._n_trials == agent._n_trials
    for name in ("n_particles", "horizon", "estimator", "seed", "learning_rate"):
        assert getattr(loaded, name) == getattr(agent, name), name
    assert tuple(loaded.angle_dims) == (1,)


def test_training_continues_after_load(tmp_path):
    agent = make(policy="LinearPolicy").learn(14)
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(first=50), device="cpu")
    memory = logged(loaded)
    loaded.learn(7, reset_num_timesteps=False)
    assert loaded.num_timesteps == 21 and loaded._n_trials == 3 and loaded._n_updates == 9
    assert len(loaded.dynamics.inputs) == 21
    assert loaded.dynamics.inputs[14:, 0].min() > 49  # the new environment's data
    # A loaded agent is not random again: its third trial follows the policy it had.
    expected, _ = agent.predict(loaded.dynamics.inputs[14:, :2].float().numpy())
    scaled = agent.policy.scale_action(expected)
    assert np.abs(scaled).max() > 0.1
    np.testing.assert_allclose(loaded.dynamics.inputs[14:, 2:], scaled, atol=1e-5)
    assert "model_fit/standardised_error" in memory.dumps[0][0]


def test_agent_saved_before_its_first_fit_fits_as_if_it_had_not_been_saved(tmp_path):
    """After a random trial there are data but no hyper-parameters."""
    agent = make(random_trials=2).learn(7)
    assert not agent.dynamics.is_fitted
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(first=1), device="cpu")
    assert not loaded.dynamics.is_fitted
    for each in (agent, loaded):
        each.dynamics.fit(max_evaluations=5)
    for name, value in agent.dynamics.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded.dynamics.state_dict()[name], value), name


def test_save_and_load_with_objects_for_estimator_and_cost(tmp_path):
    agent = make(CostEnv(), estimator=estimators.make("tpx", cross_fit=True), cost_fn=cost_of_time)
    agent.learn(7).save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CostEnv(), cost_fn=cost_of_time, device="cpu")
    assert loaded.estimator == agent.estimator and loaded.cost_fn is cost_of_time
    loaded.learn(7)


def cost_of_time(states):
    return states[..., 1]


def test_a_cost_fn_set_as_an_attribute_is_asked_for_at_the_next_load(tmp_path):
    agent = make().learn(7)
    agent.cost_fn = cost_of_time
    agent.learn(7, reset_num_timesteps=False)
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu")
    with pytest.raises(ValueError, match="made with a cost_fn"):
        loaded.learn(7)


def test_a_cost_fn_that_is_taken_away_is_not_asked_for():
    agent = make(cost_fn=cost_of_time).learn(7)
    agent.cost_fn = None
    agent.learn(7, reset_num_timesteps=False)
    assert agent._problem.cost is None


def test_integration_that_is_given_without_effect_is_said():
    """And that lacks the time of a step is refused."""
    for given in ({"integrated_dims": ((0, 1),)}, {"time_step": 0.1}):
        with pytest.warns(UserWarning, match="have no effect, since speed integration is off"):
            make(**given)
    with pytest.raises(ValueError, match=r"pass integrated_dims.* and time_step"):
        make(speed_integration="auto", integrated_dims=((0, 1),))


def test_a_cost_fn_given_to_load_is_asked_for_at_the_next_load(tmp_path):
    make().save(tmp_path / "without")
    agent = PIPPS.load(tmp_path / "without", env=CountingEnv(), cost_fn=cost_of_time, device="cpu")
    agent.learn(7).save(tmp_path / "with")
    loaded = PIPPS.load(tmp_path / "with", env=CountingEnv(), device="cpu")
    with pytest.raises(ValueError, match="made with a cost_fn"):
        loaded.learn(7)


def test_loading_an_agent_that_had_a_cost_fn_does_not_swap_the_cost_silently(tmp_path, monkeypatch):
    """Kept, warned about or refused: anything but a reward GP that nobody asked for."""
    seen = spy_on_search(monkeypatch)
    make(cost_fn=cost_of_time).learn(7).save(tmp_path / "agent")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PIPPS.load(tmp_path / "agent", env=CountingEnv(), device="cpu").learn(7)
        except ValueError as refusal:
            caught.append(refusal)
    told = any("cost_fn" in str(getattr(w, "message", w)) for w in caught)
    assert told or torch.equal(seen[-1][0].cost(STATE, ACTION), STATE[:, 1])


def test_get_and_set_parameters_carry_policy_and_model():
    agent, other = make().learn(14), make(seed=1).learn(7)
    assert set(agent.get_parameters()) == {"policy", "dynamics", "reward_model"}
    assert not np.array_equal(agent.predict(OBSERVATIONS)[0], other.predict(OBSERVATIONS)[0])
    other.set_parameters(agent.get_parameters())
    np.testing.assert_array_equal(agent.predict(OBSERVATIONS)[0], other.predict(OBSERVATIONS)[0])
    assert len(other.dynamics.inputs) == 14
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert torch.equal(agent.dynamics.posterior(x).mean, other.dynamics.posterior(x).mean)
    other.learn(7)


def test_parameters_of_an_agent_with_more_data_load_from_a_file(tmp_path):
    agent = make().learn(21)
    agent.save(tmp_path / "agent")
    fresh = make()
    fresh.set_parameters(tmp_path / "agent")
    assert torch.equal(fresh.dynamics.inputs, agent.dynamics.inputs)


def test_learning_goes_on_from_the_parameters_that_were_set():
    trained = make().learn(14)
    other = make(seed=1, learning_rate=1e-9)
    other.set_parameters(trained.get_parameters())
    other.learn(7)
    torch.testing.assert_close(parameters(other), parameters(trained), atol=1e-6, rtol=0)


def test_inputs_and_targets_of_different_numbers_are_refused_when_a_file_is_read(tmp_path):
    agent, fresh = make().learn(14), make()
    state = agent.get_parameters()
    state["dynamics"] = {**state["dynamics"], "targets": state["dynamics"]["targets"][:5]}
    agent.get_parameters = lambda: state
    agent.save(tmp_path / "agent")
    message = "inputs and targets in 'dynamics' differ in length"
    with pytest.raises(ValueError, match=message):
        PIPPS.load(tmp_path / "agent", device="cpu")
    with pytest.raises(ValueError, match=message):
        fresh.set_parameters(tmp_path / "agent")
    assert len(fresh.dynamics.inputs) == 0


def test_hyper_parameters_that_overflow_are_refused():
    agent = make().learn(14)
    state = agent.get_parameters()
    state["dynamics"] = {**state["dynamics"], "log_signal": torch.full((2,), 1e4).double()}
    with pytest.raises(ValueError, match="'dynamics' cannot be used: its 'log_signal' reaches"):
        make().set_parameters(state)


def test_set_parameters_of_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"\[\d+, 3\] in the file, \[\d+, 2\] here"):
        make().set_parameters(make(angle_dims=(1,)).learn(7).get_parameters())


# Vector environments


def test_set_env_replaces_cost_and_start(monkeypatch):
    seen = spy_on_search(monkeypatch)
    agent = make().learn(7)
    agent.set_env(CostEnv())
    agent.learn(7, reset_num_timesteps=False)
    assert not torch.equal(seen[0][0].cost(STATE, ACTION), CostEnv().cost(STATE))
    torch.testing.assert_close(seen[1][0].cost(STATE, ACTION), CostEnv().cost(STATE))
    np.testing.assert_array_equal(seen[1][0].start_mean, [3.0, 0.0])


def test_a_given_cost_survives_set_env(monkeypatch):
    seen = spy_on_search(monkeypatch)
    agent = make(cost_fn=cost_of_time)
    agent.set_env(CostEnv())
    agent.learn(7)
    torch.testing.assert_close(seen[0][0].cost(STATE, ACTION), STATE[:, 1])


def test_the_models_two_processes_are_those_in_the_file(tmp_path):
    agent = make().learn(7)
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", device="cpu")
    assert loaded.dynamics is loaded.world_model.gp
    assert loaded.reward_model is loaded.world_model.reward_gp
    assert torch.equal(loaded.world_model.gp.inputs, agent.dynamics.inputs)


# Logging


def test_scalars_are_logged():
    agent = make(estimator="tpx")
    memory = logged(agent)
    agent.learn(14)
    assert [step for _, step in memory.dumps] == [7, 14]
    first, second = (values for values, _ in memory.dumps)
    needed = {
        "train/loss": 1,
        "train/gradient_norm": 1,
        "train/gradient_snr": 1,
        "train/k": 1,
        "train/n_updates": 1,
        "train/skipped_steps": 1,
        "k/step_01": 1,
        "k/step_05": 1,
        "k/coordinate_0": 1,
        "k/coordinate_1": 1,
        "train/z": 1,
        "train/node_snr_rp": 1,
        "z/step_05": 1,
        "snr/step_01": 1,
        "gp/noise_0": 1,
        "gp/signal_1": 1,
        "gp/lengthscale_1_2": 1,
        "gp/data": 1,
        "rollout/ep_rew_mean": 1,
        "rollout/ep_len_mean": 1,
        "time/total_timesteps": 1,
    }
    for values in (first, second):
        assert set(needed) <= set(values)
        assert all(np.isfinite(values[key]) for key in needed)
    # Only a model that exists can be compared with a trial.
    assert "model_fit/standardised_error" not in first
    assert {"model_fit/standardised_error", "model_fit/rmse_0", "model_fit/rmse_1"} <= set(second)
    assert (first["gp/data"], second["gp/data"]) == (7, 14)
    assert (first["train/n_updates"], second["train/n_updates"]) == (3, 6)
    assert second["rollout/ep_rew_mean"] == -28 and second["rollout/ep_len_mean"] == 7
    assert 0 <= first["train/k"] <= 1 and "k/step_08" not in first


@pytest.mark.parametrize(("estimator", "k"), [("rp", 0.0), ("lr", 1.0)])
def test_logged_k_is_the_estimators(estimator, k):
    agent = make(estimator=estimator)
    memory = logged(agent)
    agent.learn(7)
    values = memory.dumps[0][0]
    assert values["train/k"] == values["k/step_03"] == values["k/coordinate_1"] == k


def test_z_and_ratios_are_not_logged_of_resampled_particles():
    """These depend on each other, so that a standard error of their mean is not known."""
    found = []
    for estimator in ("rp", "gr"):
        agent = make(estimator=estimator)
        memory = logged(agent)
        agent.learn(7)
        found.append({"train/z", "train/node_snr"} & set(memory.dumps[0][0]))
    assert found == [{"train/z", "train/node_snr"}, set()]


def test_skipped_gradients_do_not_spoil_the_logged_norm():
    class Sometimes:
        calls = 0

        def __call__(self, states):
            Sometimes.calls += 1
            # It is tried by the constructor, `learn` and the search before its three steps.
            return states.sum(-1) * (float("nan") if Sometimes.calls == 5 else 1.0)

    agent = make(cost_fn=Sometimes())
    memory = logged(agent)
    agent.learn(7)
    assert memory.dumps[0][0]["train/skipped_steps"] == 1
    assert np.isfinite(memory.dumps[0][0]["train/gradient_norm"])


def test_figures_and_scalars_reach_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    agent = make(CARTPOLE, tensorboard_log=str(tmp_path)).learn(60)
    agent.logger.close()
    (folder,) = Path(tmp_path).iterdir()
    assert folder.name == "PIPPS_1"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"figures/k", "figures/z_and_snr", "figures/prediction"} <= set(tags["images"])
    assert {"train/loss", "k/step_01", "gp/noise_3"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == [30, 60]
    assert [e.step for e in events.Images("figures/prediction")] == [60]


def test_the_progress_bar_is_that_of_the_steps_with_a_line_for_each_search(monkeypatch):
    from rich.progress import Progress

    tasks, bars, original = [], [], Progress.add_task

    def spy(self, description, **kwargs):
        tasks.append((description, kwargs["total"]))
        bars.append(self)
        return original(self, description, **kwargs)

    monkeypatch.setattr(Progress, "add_task", spy)
    make().learn(14, progress_bar=True)
    assert tasks == [
        ("", 14),
        ("trial 1: policy search on 7 points", 3),
        ("trial 2: policy search on 14 points", 3),
    ]
    (bar,) = bars[0].tasks  # those of the searches are gone
    assert bars == [bars[0]] * 3 and bar.completed == bar.total == 14


# Reproducibility


# It learns


@pytest.mark.slow
def test_cartpole_swings_up_after_a_few_trials():
    """tpx, seed 7, 1 random trial and 4 searches: mean cost of 30 rollouts < 15 (start: 27)."""
    agent = PIPPS("RBFPolicy", CARTPOLE, estimator="tpx", seed=7, device="cpu")
    agent.learn(4 * 30)
    env = Monitor(gym.make(CARTPOLE))
    env.reset(seed=123)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=30)
    assert -mean < 15


def test_unicycle_runs_trials_of_its_preset():
    """Inputs: 10 observations without the yaw, and 2 torques; targets: all 10 differences."""
    preset = {**PRESETS["pipps2018-unicycle"], "n_particles": 12, "gradient_steps": 2}
    env = gym.make("totalprop/Unicycle-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = PIPPS(env=env, **{**preset, "random_trials": 1}, gp_evaluations=5, seed=0,
                      device="cpu")  # fmt: skip
        before = parameters(agent)
        agent.learn(30)
    model, policy = agent.world_model, agent.policy
    assert model.gp.inputs.shape == (30, 11) and model.gp.targets.shape == (30, 10)
    assert isinstance(policy, LinearPolicy) and len(before) == 22
    assert agent._n_updates >= 2 and not torch.equal(parameters(agent), before)
    # Cost, start and invariances are the environment's.
    problem, views = agent._problem, torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(problem.step_cost(model)(views, views), env.unwrapped.cost(views))
    np.testing.assert_array_equal(problem.start, env.unwrapped.initial_distribution)
    assert agent.invariant_dims == (8,)
    # A random trial of 4 steps at least comes first, with a fifth of the torques.
    assert model.gp.inputs[:4, -2:].abs().max() <= 0.2 + 1e-6
    action, _ = agent.predict(np.zeros(10, np.float32))
    assert action.shape == (2,) and env.action_space.contains(action)


def test_policy_search_lowers_the_simulated_cost():
    """Known model, linear policy, 40 steps of Adam on 200 particles: from about 0.5 a step down."""
    changes = {"gradient_steps": 40, "learning_rate": 0.1, "gp_evaluations": 50}
    agent = make(CostEnv(), "LinearPolicy", n_particles=200, **changes)
    memory = logged(agent)
    agent.learn(LENGTH)
    values = memory.dumps[-1][0]
    assert values["train/loss"] < 0.95 * values["train/loss_first"]


# Trials that end in other ways than by themselves


class StopAfterTrials(BaseCallback):
    """As StopTrainingOnMaxEpisodes: stops at the step that ends a trial."""

    def __init__(self, trials):
        super().__init__()
        self.left = trials

    def _on_step(self):
        self.left -= int(self.locals["dones"].sum())
        return self.left > 0


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_a_callback_that_stops_at_the_end_of_a_trial_postpones_the_search(trials):
    agent, searches = make(), []
    search = agent._search
    agent._search = lambda on_step: searches.append(agent.num_timesteps) or search(on_step)
    agent.learn(4 * LENGTH, callback=StopAfterTrials(trials))
    assert agent.num_timesteps == trials * LENGTH
    agent.learn((4 - trials) * LENGTH, reset_num_timesteps=False)
    assert searches == [LENGTH, 2 * LENGTH, 3 * LENGTH, 4 * LENGTH]


def test_a_search_that_is_due_is_in_the_file(tmp_path):
    agent = make().learn(4 * LENGTH, callback=StopAfterTrials(2))
    agent.save(tmp_path / "agent")
    loaded = PIPPS.load(tmp_path / "agent", CountingEnv(), device="cpu")
    assert loaded._search_due and loaded._n_updates == 3
    loaded.learn(LENGTH, reset_num_timesteps=False)
    assert not loaded._search_due and loaded._n_updates == 9


@pytest.mark.parametrize("calls", [(15, 9), (5, 4, 15), (8, 16)])
def test_a_trial_without_a_time_limit_keeps_its_length_over_calls_of_learn(calls):
    """Rewards are minus the time, so that each episode's return is that of its length."""
    agent, ends = make(CountingEnv(10**6), horizon=6), []
    update = agent._update_info_buffer
    agent._update_info_buffer = lambda infos, *dones: (
        ends.extend(info["episode"] for info in infos if "episode" in info),
        update(infos, *dones),
    )
    for i, steps in enumerate(calls):
        agent.learn(steps, reset_num_timesteps=i == 0)
    assert [(end["l"], end["r"]) for end in ends] == [(6, -21.0)] * 4


# What is logged, and what has no effect


def test_the_logged_loss_is_of_the_policy_that_is_kept():
    """Within 5 deviations of what its simulations cost; not that of a search's last evaluation."""
    agent = make(CostEnv(), keep_best=True, gradient_steps=40, n_particles=200)
    memory = logged(agent)
    agent.learn(2 * LENGTH)
    model = agent._particle_model()
    costs = [agent._simulate_trial(model)[0] for _ in range(20)]
    found = [values["train/loss"] for values, _ in memory.dumps if "train/loss" in values][-1]
    assert abs(found - np.mean(costs)) < 5 * np.std(costs)


@pytest.mark.parametrize(
    ("estimator", "is_logged"), [("tpx", True), ("rp-fs", False), ("gr-fs", False)]
)
def test_a_search_without_a_step_size_logs_none(estimator, is_logged):
    agent = make(estimator=estimator)
    memory = logged(agent)
    agent.learn(LENGTH)
    assert any("train/learning_rate" in values for values, _ in memory.dumps) == is_logged


@pytest.mark.parametrize("estimator", ["rp-fs", "gr-fs"])
def test_keep_best_leaves_a_search_alone_that_ends_with_its_best(estimator):
    found = [
        make(estimator=estimator, keep_best=keep, gradient_steps=15).learn(LENGTH)
        for keep in (False, True)
    ]
    assert torch.equal(*(parameters(agent) for agent in found))


def test_an_optimiser_that_the_estimator_does_not_use_is_refused():
    with pytest.raises(ValueError, match="'rp-fs' fixes the noise for optimizer 'quasi-newton'"):
        make(estimator="rp-fs", optimizer="rmsprop2018")


def test_the_cost_of_an_end_that_never_comes_is_a_warning():
    found = messages(lambda: make(termination="ignore", termination_cost=5.0).learn(LENGTH))
    assert any("termination_cost=5 has no effect" in text for text in found)


def test_actions_have_the_dtype_of_the_space():
    env = CountingEnv()
    env.action_space = spaces.Box(LOW, HIGH, (1,), np.float16)
    action, _ = make(env).predict(np.zeros(2, np.float32))
    assert action.dtype == np.float16 and env.action_space.contains(action)


@pytest.mark.parametrize("space", [spaces.Dict({"a": spaces.Box(0, 1, (2,))}), spaces.Discrete(3)])
def test_observations_that_are_no_vector_raise_what_stable_baselines3_raises(space):
    env = CountingEnv()
    env.observation_space = space
    with pytest.raises(AssertionError, match="models a vector of real numbers"):
        make(env)
